"""`python -m moeut_compose` is the command `moeut-compose`."""

from moeut_compose.cli import app

if __name__ == "__main__":
    app(prog_name="moeut-compose")
