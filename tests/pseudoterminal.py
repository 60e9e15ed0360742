"""A terminal for programs that a test starts, on the systems that have pseudo-terminals."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from select import select

ASK = b"\x1b[c"


class Terminal:
    """A pseudo-terminal that runs a program, answers its question, and keeps what it writes."""

    def __init__(self, answer=b"", size=(24, 80, 0, 0), **environment):
        self.answer, self.environment = answer, environment
        self.ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("4H", *size))

    def run(self, program, *arguments, stdin=None):
        """What the program writes to the terminal."""
        unset = ("TMUX", "TERM_PROGRAM", "LC_TERMINAL", "KITTY_WINDOW_ID")
        environment = {name: value for name, value in os.environ.items() if name not in unset}
        environment |= {"TERM": "xterm", **self.environment}
        before = termios.tcgetattr(self.theirs)
        command = [sys.executable, "-c", program, *map(str, arguments)]
        process = subprocess.Popen(command, stdin=stdin or self.theirs, stdout=self.theirs, env=environment)
        written = self.read_until_it_ends(process)
        assert process.returncode == 0
        assert termios.tcgetattr(self.theirs) == before  # or the shell would no longer echo
        os.close(self.theirs)
        os.close(self.ours)
        return written.replace(b"\r\n", b"\n")

    def read_until_it_ends(self, process):
        written = b""
        while process.poll() is None or select([self.ours], [], [], 0)[0]:
            if select([self.ours], [], [], 0.05)[0]:
                written += os.read(self.ours, 65536)
                if ASK in written and self.answer:
                    os.write(self.ours, self.answer)
                    self.answer = b""
        return written
