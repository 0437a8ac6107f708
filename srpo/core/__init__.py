"""Shared by every room: config and settings, steps, rollouts and batches, metrics, tables, progress bars, run folders."""

from srpo.core.interrupts import end_at_signals, is_a_program

if is_a_program():  # before anything else is imported: Ctrl-C at the start of a program is one line, too
    end_at_signals()
