"""Known sets of captioned photographs, from Kaggle.

In: the name of a set, a folder. Out: its captions, read; on disk the folder as Kaggle delivers it. Knows nothing of
what is done with them. The library kagglehub (the extra `data`) does the work and keeps what it has downloaded.
"""

from __future__ import annotations

from pathlib import Path

from clipmatch.data import CaptionSet, load_captions
from clipmatch.errors import ClipmatchError, reason_of

SETS = {"flickr8k": "adityajn105/flickr8k", "flickr30k": "hsankesara/flickr-image-dataset"}


def download(name: str, out: str | Path | None = None) -> CaptionSet:
    """A set of `SETS` -> its captions. out: an empty folder for it; None leaves the place to kagglehub.

    Raises ClipmatchError if the library, the network, the permission or what is needed of the set is missing.
    """
    try:
        import kagglehub
    except ModuleNotFoundError as error:
        raise ClipmatchError(
            f'Downloading {name} needs kagglehub; install it with: pip install "clipmatch[data]"'
        ) from error
    handle = SETS[name]
    place = {"output_dir": str(Path(out).expanduser())} if out else {}
    try:
        folder = kagglehub.dataset_download(handle, **place)
    except Exception as error:  # of kagglehub, of requests below it, of the operating system: a dozen kinds
        raise explain(error, handle, out) from error
    return load_captions(folder)


def explain(error: Exception, handle: str, out: str | Path | None) -> ClipmatchError:
    """What went wrong with a download, in a sentence."""
    import requests
    from kagglehub.exceptions import CredentialError, UnauthenticatedError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or isinstance(error, CredentialError | UnauthenticatedError):
        said = f" ({status})" if status else ""
        return ClipmatchError(
            f"Kaggle refuses to hand out {handle}{said}: make an API token in the settings of your Kaggle account, put "
            "it into ~/.kaggle/kaggle.json or the variable KAGGLE_API_TOKEN, and try again."
        )
    if status == 404:
        return ClipmatchError(f"Kaggle has no data set {handle} any more; get it elsewhere, and give its caption file.")
    if isinstance(error, requests.ConnectionError | requests.Timeout):
        return ClipmatchError(f"Kaggle can't be reached to download {handle}; check the network, and try again.")
    if isinstance(error, FileExistsError):
        return ClipmatchError(f"{out} is a file or is not empty; name an empty folder, or one that is not there yet.")
    return ClipmatchError(f"The download of {handle} from Kaggle failed ({reason_of(error)}); try again.")
