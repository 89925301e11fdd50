"""The one exception a user should ever see: a single line that says what to do."""


class PrunelabError(ValueError):
    """A mistake in the input, found before work starts. The message is one line and names the remedy."""
