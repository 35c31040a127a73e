"""The targets that bundles are written for. Each folder alone imports its toolchain."""
