"""Names on the Hugging Face hub: is it reachable, and one sentence when it does not give what was asked for.

In: a hub name or local folder, and what went wrong. Out: keywords for the hub's own libraries, `ClipmatchError`. Knows
nothing of models.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

from clipmatch.errors import ClipmatchError


def local_or_name(source: str) -> str:
    """A local folder with `~` filled in, or the hub name as it is."""
    path = Path(source).expanduser()
    return str(path) if path.is_dir() else source


def offline() -> bool:
    """Whether the hub can't be reached now, by one short request.

    Asked first, because the hub's libraries repeat a request in vain for half a minute, and that for each file. They
    are then told to look in the local cache only.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # every kind of network error of whichever HTTP library the hub's library uses
        return True
    return False


def hub_error(source: str, error: BaseException) -> ClipmatchError:
    """The sentence for a tower, tokenizer or model that can't be had; `error` is what the loading library raised."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    causes = list(chain_of(error))
    responses = [getattr(cause, "response", None) for cause in causes if isinstance(cause, HfHubHTTPError)]
    codes = {response.status_code for response in responses if response is not None}
    otherwise = "or name a local model folder instead."
    if looks_local(source) or any(isinstance(cause, HFValidationError) for cause in causes):
        text = f"{source!r} holds no Hugging Face model (config.json and model.safetensors); name another folder."
    elif any(isinstance(cause, GatedRepoError) for cause in causes) or 403 in codes:
        text = (
            f"The hub gives {source!r} only to those allowed; accept its terms, log in by: hf auth login, {otherwise}"
        )
    elif any(isinstance(cause, RepositoryNotFoundError) for cause in causes) or codes & {401, 404}:
        text = (
            f"The hub has no model {source!r}, or only for those logged in; check the spelling, log in by: "
            f"hf auth login, {otherwise}"
        )
    elif "does not appear to have" in str(error):
        text = f"The hub model {source!r} has no weights in safetensors form; choose another, {otherwise}"
    elif "model_type" in str(error) or "custom code" in str(error):
        text = f"The hub model {source!r} is not one that transformers can build by itself; choose another, {otherwise}"
    else:
        text = (
            f"The hub model {source!r} can't be reached and is not in the local cache; connect to the network, "
            f"{otherwise}"
        )
    return ClipmatchError(text)


def looks_local(source: str) -> bool:
    """Whether a name can only mean a path."""
    return source.startswith((".", "/", "~")) or "\\" in source or Path(source).exists()


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Loading bars and advice about unused weights say nothing that a person can act on here."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
