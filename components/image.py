"""The decorator of all components. Every pipeline run sets the image of its steps by the parameter `image`."""

from functools import partial

from kfp import dsl

IMAGE = "registry.example/mplug-video/training:0.1.0"

# install_kfp_package=False: the image contains kfp; otherwise every step would run pip, which needs a network
component = partial(dsl.component, base_image=IMAGE, install_kfp_package=False)
