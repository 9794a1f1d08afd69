"""How all commands end: by the signals that mean it, and with handlers as they were."""

import os
import signal

import pytest

from benchmarks import command


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_signals_end_the_work_as_ctrl_c_does(kind, before):
    kept = signal.signal(kind, before)
    try:
        outlives = kind is signal.SIGHUP and before is signal.SIG_IGN  # as nohup has it
        if outlives:
            with command.ended_by_signals():
                os.kill(os.getpid(), kind)
        else:
            with pytest.raises(KeyboardInterrupt), command.ended_by_signals():
                os.kill(os.getpid(), kind)
        assert signal.getsignal(kind) is before
    finally:
        signal.signal(kind, kept)
