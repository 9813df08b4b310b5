"""What a step is compiled with: every run of a pipeline names its image, by the parameter `image`."""

from functools import partial

from kfp import dsl

IMAGE = "registry.example/mplug-video/training:0.1.0"

# install_kfp_package=False: the image has kfp; without it every step would start with pip and need a network
component = partial(dsl.component, base_image=IMAGE, install_kfp_package=False)
