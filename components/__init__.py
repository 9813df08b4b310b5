"""KFP steps: each a signature and one call into the package, which the image and the laptop have installed alike."""
