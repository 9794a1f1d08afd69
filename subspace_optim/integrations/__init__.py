"""A ``Monitor`` in the training loops of others, in one line each.

=========================== ==========================================================
``transformers``            ``MonitorCallback`` and ``SAMCallback`` of a ``Trainer``
``lightning``               ``MonitorCallback`` of a ``Trainer``
``accelerate``              ``attach``, of what ``accelerator.prepare`` returned
=========================== ==========================================================

Each imports its library when it is imported itself. In a loop of your own, ``Fabric``'s too, it is
``Monitor`` alone.
"""
