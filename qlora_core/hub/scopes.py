"""Scopes of a sign-in with Hugging Face: which of them a push takes, and how a person comes to one. Asks nobody.

Source: https://huggingface.co/docs/hub/oauth, "Currently supported scopes" and "Accessing organization resources".
"""

from collections.abc import Collection

WRITES = ("write-repos", "manage-repos")
CREATES = ("contribute-repos", "manage-repos")
READS_PRIVATE = ("read-repos", *WRITES)
DISCUSSES, COLLECTS = "write-discussions", "write-collections"
COLLECTS_PERMISSION = "collection.write"  # of a fine-grained token
PREFIX = "hf_oauth_"  # of the tokens that a sign-in gives


def has(scopes: Collection[str] | None, names: Collection[str]) -> bool:
    """One of the scopes, or that is not told."""
    return scopes is None or any(name in scopes for name in names)


def ask_for(names: Collection[str], person: str) -> str:
    """How a signed-in person comes to one of the scopes."""
    return (
        f"that takes the scope {' or '.join(names)}: whoever keeps this Space adds it to hf_oauth_scopes in its README.md, and "
        f"{person} signs in again; or type a token that may write"
    )


def refused() -> str:
    """What a sign-in may lack, where the Hub does not say what it was."""
    return (
        "a sign-in reaches only what it was asked for: a repository that this app has not made takes the scope "
        f"{' or '.join(WRITES)}, a pull request {DISCUSSES}, a collection {COLLECTS}, and an organization must be granted "
        "when signing in; add the scope to hf_oauth_scopes in the Space's README.md and sign in again, or type a token that "
        "may write there"
    )
