"""The category of the package's own warnings."""


class AdapterWarning(UserWarning):
    """Something about an adapted model that is probably not intended.

    The package issues all its warnings in this category, so that they can be
    silenced, or turned into errors, apart from those of other packages:

    ```python
    import warnings

    warnings.simplefilter("error", kra.AdapterWarning)
    ```
    """
