"""What every test runs under."""

import signal

# A shell's background job starts with SIGINT ignored, and so would every program that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
