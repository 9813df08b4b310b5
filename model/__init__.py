"""mPLUG-Video: video-language networks, their data, training and evaluation (Youku-mPLUG, arXiv 2306.04362)."""
