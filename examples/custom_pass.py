"""A pass from outside the package: log each request. Run: python examples/custom_pass.py."""

import time
from contextlib import contextmanager

import chatterbox_turbo as turbo


class RequestLog(turbo.Pass):
    """Prints text and real-time factor of every ``generate``."""

    name = "request_log"
    summary = "one line on standard output for each request"
    patch_points = ("generate",)  # must have its known shape, or the pass does not run

    def apply(self, context):
        @contextmanager
        def scope(call):
            start = time.perf_counter()
            yield  # upstream's generate runs here; call.result is its return value afterwards
            seconds = call.result.shape[-1] / context.parts.model.sr
            print(f"{seconds:.1f} s of audio at {(time.perf_counter() - start) / seconds:.2f} x real time")

        context.scopes.append(scope)
        context.journal.set(context.parts.model, "requests_logged", True)  # every write goes through the journal
        return "prints to standard output"


if __name__ == "__main__":
    model = turbo.apply(turbo.synthetic.build("english", "tiny"), passes=[RequestLog()])
    model.generate("Hello.")
    print(model.turbo.report())
    turbo.revert(model)
    assert not hasattr(model, "requests_logged")
