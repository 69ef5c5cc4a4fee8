"""The commands of the command line, in modules of their own; each imports what it needs when it runs."""
