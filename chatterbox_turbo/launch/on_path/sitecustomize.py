"""Run by Python as it starts, in processes that ``chatterbox-turbo run`` has started and in their children.

Its folder is on PYTHONPATH there. A ``sitecustomize`` of the environment's own is run afterwards, as without this one.
"""

import os
import sys


def _other():
    """Take this file's folder off the path, and run the sitecustomize that is there without it."""
    here = os.path.realpath(os.path.dirname(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != here]
    this = sys.modules.pop(__name__, None)
    try:
        import sitecustomize  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
    finally:  # whoever imports this file looks there for it
        sys.modules.setdefault(__name__, this)


try:
    from chatterbox_turbo.launch.startup import start
except ImportError as missing:  # another environment's interpreter
    told = hasattr(sys, "_no_chatterbox_turbo")  # by the file that `enable` writes
    if os.environ.get("CHATTERBOX_TURBO") and sys.stderr is not None and not told:
        sys.stderr.write(f"chatterbox-turbo: {sys.executable} cannot import it, and runs without: {missing}\n")
else:
    start()
finally:
    _other()
