"""The image of every step, written once: $MPLUG_IMAGE when a pipeline is compiled."""

import os
from functools import partial

from kfp import dsl

IMAGE = os.environ.get("MPLUG_IMAGE", "mplug-video-python:dev")

# install_kfp_package=False: the image has kfp; without it every step would start with pip and need a network
component = partial(dsl.component, base_image=IMAGE, install_kfp_package=False)
