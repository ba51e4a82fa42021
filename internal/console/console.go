// Package console runs a firmware in QEMU and uses it as a person does, on its
// serial console. Tests see with it what real firmware makes of our images.
package console

import (
	"bytes"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"time"
)

const (
	// timeout bounds each wait.
	timeout = 2 * time.Minute
	poll    = 20 * time.Millisecond
	// Firmware's receive buffers are small, and it polls them.
	betweenKeys = 10 * time.Millisecond
)

// A Console is a program whose standard input and output are a terminal.
type Console struct {
	cmd    *exec.Cmd
	keys   io.Writer
	exited chan struct{}
	err    error // of the program; read it when exited is closed

	mu  sync.Mutex
	out bytes.Buffer
}

// Start runs a program, which must have its console on standard input and
// output.
func Start(program string, args ...string) (*Console, error) {
	c := &Console{cmd: exec.Command(program, args...), exited: make(chan struct{})}
	c.cmd.Stdout, c.cmd.Stderr = c, c
	var err error
	if c.keys, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		c.err = c.cmd.Wait()
		close(c.exited)
	}()
	return c, nil
}

// Write takes what the program says.
func (c *Console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out.Write(p)
}

var escape = regexp.MustCompile(`\x1b(\[[0-9;=?]*[A-Za-z]|[78])`)

// Text is what the console has shown so far, without the terminal's control
// sequences.
func (c *Console) Text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return escape.ReplaceAllString(c.out.String(), "")
}

// WaitFor waits until the console has shown a text.
func (c *Console) WaitFor(text string) error { return c.waitFor(text, 1) }

func (c *Console) waitFor(text string, times int) error {
	for end := time.Now().Add(timeout); ; time.Sleep(poll) {
		shown := c.Text()
		if strings.Count(shown, text) >= times {
			return nil
		}
		select {
		case <-c.exited:
			return fmt.Errorf("%s ended (%v) without showing %q: %s", c.cmd.Path, c.err, text, shown)
		default:
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s never showed %q: %s", c.cmd.Path, text, shown)
		}
	}
}

// Type presses keys, one after another.
func (c *Console) Type(keys string) error {
	for i := range len(keys) {
		if _, err := c.keys.Write([]byte{keys[i]}); err != nil {
			return err
		}
		time.Sleep(betweenKeys)
	}
	return nil
}

// Run types a command and returns what was shown until the next prompt.
func (c *Console) Run(command, prompt string) (string, error) {
	before := c.Text()
	if err := c.Type(command + "\r"); err != nil {
		return "", err
	}
	if err := c.waitFor(prompt, strings.Count(before, prompt)+1); err != nil {
		return "", err
	}
	return c.Text()[len(before):], nil
}

// Wait waits for the program's end.
func (c *Console) Wait() error {
	select {
	case <-c.exited:
		return c.err
	case <-time.After(timeout):
		return fmt.Errorf("%s doesn't end: %s", c.cmd.Path, c.Text())
	}
}

// Close ends the program, if it hasn't ended.
func (c *Console) Close() {
	_ = c.cmd.Process.Kill() // it may have ended
	<-c.exited
}
