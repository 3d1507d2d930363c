"""A finished compression -> a version in the registry: packaged, checked, promoted and reproduced."""
