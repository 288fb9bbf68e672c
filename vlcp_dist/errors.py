"""The errors that a user can mend: they are shown as one message, without a traceback."""


class InputError(ValueError):
    """Data or settings that cannot be used as they are; the message names them and the way out."""


class ConfigError(InputError):
    """A configuration that cannot be run; the message names the key, the value and the way out."""


class StageFailed(RuntimeError):
    """A stage did not finish; the message says what failed, where it is written and what to do."""


class Stopped(Exception):
    """A unit gave up midway because it was asked to; how far it came is saved."""
