"""A run from its plan to its result, in this process or in torchrun's; never ray."""
