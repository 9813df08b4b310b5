"""Uploads a folder to a model hub. Only this file talks to Hugging Face and ModelScope.

An interrupted upload continues where it ended: both hubs know the content that they already have.
"""

import os
from pathlib import Path

from model.errors import ConfigError, OutageError, UserError

PRIVATE, PUBLIC = "private", "public"


def upload(folder: Path, repo: str, hub: str, visibility: str) -> str:
    """Creates the repository if there is none, commits the files of the folder to it, and returns its URL.

    Addresses and tokens are those of the hub's own client: HF_ENDPOINT and HF_TOKEN, MODELSCOPE_ENDPOINT and
    MODELSCOPE_API_TOKEN, or what its login has stored. Raises ConfigError if the hub refuses, OutageError if it does
    not answer.
    """
    return HUBS[hub](folder, repo, visibility)


def _huggingface(folder: Path, repo: str, visibility: str) -> str:
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        url = api.create_repo(repo, private=visibility == PRIVATE, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload model")
    except HfHubHTTPError as error:
        raise _refused("huggingface", "hf auth login", error.response.status_code, error) from error
    except (HTTPError, OSError, RuntimeError) as error:  # hf_xet raises RuntimeErrors
        raise _refused("huggingface", "", 0, error) from error
    return str(url)


def _modelscope(folder: Path, repo: str, visibility: str) -> str:
    os.environ.setdefault("MODELSCOPE_LOG_LEVEL", "WARNING")  # its progress bars say enough
    from modelscope_hub import HubApi, HubConfig
    from modelscope_hub.errors import APIError, HubError

    config = HubConfig()
    api = HubApi(config)
    try:
        if not api.repo_exists(repo, "model"):
            api.create_repo(repo, "model", visibility=visibility)
        api.upload_folder(repo, "model", folder, commit_message="Upload model", use_cache=False)
    except APIError as error:
        raise _refused("modelscope", "ms-hub login", error.status_code or 0, error) from error
    except HubError as error:
        raise _refused("modelscope", "", 0, error) from error
    return f"{config.endpoint}/models/{repo}"


HUBS = {"huggingface": _huggingface, "modelscope": _modelscope}


def _refused(hub: str, login: str, status: int, error: Exception) -> UserError:
    """A refusal, which would be the same next time, or an outage."""
    message = " ".join(str(error).split())[:300]
    if status in (401, 403):
        return ConfigError(f"{hub} refuses the token: {message} `{login}` stores one that may write.")
    if 400 <= status < 500 and status not in (408, 429):
        return ConfigError(f"{hub} refuses the upload: {message}")
    return OutageError(f"{hub} does not answer: {message}. The same command continues the upload.")
