package secret

import (
	"bytes"
	"fmt"
	"os"

	"golang.org/x/term"
)

// Prompt asks for a passphrase on the process's terminal, /dev/tty, without
// echo, so that input and output may be redirected. With confirm it asks
// twice, for a secret that is being set, and returns ErrMismatch if the
// entries differ. An interrupt during the prompt leaves the echo off, as the
// terminal's mode is only restored on return.
func Prompt(prompt string, confirm bool) (*Secret, error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("no terminal to ask on: %w", err)
	}
	defer tty.Close()

	first, err := ask(tty, prompt)
	if err != nil || !confirm {
		return first, err
	}
	second, err := ask(tty, "Again: ")
	if err != nil {
		first.Wipe()
		return nil, err
	}
	defer second.Wipe()
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		first.Wipe()
		return nil, ErrMismatch
	}
	return first, nil
}

func ask(tty *os.File, prompt string) (*Secret, error) {
	if _, err := fmt.Fprint(tty, prompt); err != nil {
		return nil, err
	}
	b, err := term.ReadPassword(int(tty.Fd()))
	fmt.Fprintln(tty) // the user's newline was not echoed
	defer Wipe(b)
	if err != nil {
		return nil, fmt.Errorf("reading from the terminal: %w", err)
	}
	return passphrase(b)
}
