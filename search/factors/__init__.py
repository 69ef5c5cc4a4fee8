"""Statistics of calibration text, and factors made of them once and kept in a store."""
