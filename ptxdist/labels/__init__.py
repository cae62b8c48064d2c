"""Label tables and mask folders to masks."""
