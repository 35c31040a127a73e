"""The targets that bundles are written for. Only the folder of a backend imports its toolchain."""
