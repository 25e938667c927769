"""Every error that dropfx raises, as subclasses of the built-in type that a caller would catch."""


class DropfxError(Exception):
    """Base of all errors of dropfx."""


class InvalidOption(DropfxError, ValueError):
    """An option is unknown or its value is not accepted; the message names the option and what is accepted."""


class InvalidModel(DropfxError, TypeError):
    """The object given as a model cannot be compiled (not a module, a ScriptModule, a wrapper...)."""


class InvalidInput(DropfxError, ValueError):
    """Example inputs do not fit the model's forward."""


class LoweringUnavailable(DropfxError, RuntimeError):
    """The requested lowering cannot run here."""


class PassError(DropfxError, RuntimeError):
    """A pass failed; the message names it and the passes that ran before."""


class DoubleBackwardError(DropfxError, RuntimeError):
    """A second derivative was asked for of an operation that has only a first one."""


class NotEquivalent(DropfxError, AssertionError):
    """A compiled model and its original under the same masks differ by more than the tolerance."""


class NoDropoutWarning(UserWarning):
    """dropfx.compile was given a model without any active dropout, which runs as written."""
