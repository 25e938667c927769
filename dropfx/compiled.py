"""Where models that were pickled while the front end was not yet a folder look for their parts."""

from dropfx.frontend.compiled_module import State, _rebuild

__all__ = ["State", "_rebuild"]
