"""KFP components. Each is a signature and one call into the package, which is installed in the image."""
