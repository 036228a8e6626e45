"""Every set of a few removed layers, scored: ground truth that searches can be held against."""
