"""Carrying a study out: what runs when, in this process or on Ray workers."""
