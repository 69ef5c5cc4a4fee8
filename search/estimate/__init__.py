"""A study that fits a model and a machine, and what it will take, before it is launched."""
