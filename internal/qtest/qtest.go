// Package qtest drives the devices of a QEMU without a guest, through QEMU's
// qtest protocol, and the QEMU itself through QMP. Tests see with it what a
// device shows to a driver.
//
// The machine's CPUs stand still (-S), so that no firmware gets in the way.
// Timers of the virtual clock stand still too: a device that answers later
// never does.
package qtest

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// timeout bounds each exchange, and the start.
const timeout = 60 * time.Second

// A Machine is a QEMU that runs. Its methods are for one goroutine.
type Machine struct {
	cmd    *exec.Cmd
	dir    string
	stderr bytes.Buffer
	exited chan struct{}

	test, qmp *line
}

// A line is a socket on which lines go to and fro.
type line struct {
	conn net.Conn
	in   *bufio.Reader
}

// Start runs a QEMU with arguments, to which it adds those for its own
// sockets, and for no display.
func Start(binary string, args ...string) (*Machine, error) {
	dir, err := os.MkdirTemp("", "qtest")
	if err != nil {
		return nil, err
	}
	m := &Machine{dir: dir, exited: make(chan struct{})}
	if err := m.start(binary, args); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

func (m *Machine) start(binary string, args []string) error {
	listen := func(name string) (*net.UnixListener, error) {
		return net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(m.dir, name), Net: "unix"})
	}
	test, err := listen("test")
	if err != nil {
		return err
	}
	defer test.Close()
	qmp, err := listen("qmp")
	if err != nil {
		return err
	}
	defer qmp.Close()
	m.cmd = exec.Command(binary, append([]string{"-S", "-display", "none", "-qtest", "unix:" + test.Addr().String(), "-qtest-log", "none",
		"-qmp", "unix:" + qmp.Addr().String()}, args...)...)
	m.cmd.Stdout, m.cmd.Stderr = &m.stderr, &m.stderr
	if err := m.cmd.Start(); err != nil {
		m.cmd = nil
		return err
	}
	go func() {
		m.cmd.Wait()
		close(m.exited)
		// Whoever waits for it to connect waits in vain.
		test.Close()
		qmp.Close()
	}()
	// QMP's chardev is made last; QEMU connects to both in an order of its
	// own, which backlogs make no matter.
	if m.test, err = m.accept(test); err != nil {
		return err
	}
	if m.qmp, err = m.accept(qmp); err != nil {
		return err
	}
	if _, err := m.qmp.read(); err != nil { // the greeting
		return m.died(err)
	}
	_, err = m.QMP("qmp_capabilities", nil)
	return err
}

func (m *Machine) accept(l *net.UnixListener) (*line, error) {
	l.SetDeadline(time.Now().Add(timeout))
	c, err := l.Accept()
	if err != nil {
		return nil, m.died(err)
	}
	return &line{c, bufio.NewReader(c)}, nil
}

// died says what QEMU said, if it has ended.
func (m *Machine) died(err error) error {
	select {
	case <-m.exited:
		return fmt.Errorf("%s ended: %w: %s", filepath.Base(m.cmd.Path), err, strings.TrimSpace(m.stderr.String()))
	case <-time.After(time.Second):
		return err
	}
}

// Close ends the QEMU, at once.
func (m *Machine) Close() error {
	for _, l := range []*line{m.test, m.qmp} {
		if l != nil {
			l.conn.Close()
		}
	}
	if m.cmd != nil {
		m.cmd.Process.Kill()
		<-m.exited
	}
	return os.RemoveAll(m.dir)
}

// Output is what the QEMU has printed, once Quit or Close has ended it: what the
// human monitor's qemu-io says goes there, too, and late.
func (m *Machine) Output() string {
	<-m.exited
	return m.stderr.String()
}

// Quit asks the QEMU to end, so that it closes its images, and waits for that.
func (m *Machine) Quit() error {
	if _, err := m.QMP("quit", nil); err != nil {
		return err
	}
	select {
	case <-m.exited:
		return nil
	case <-time.After(timeout):
		return errors.New("QEMU doesn't end")
	}
}

func (l *line) read() (string, error) {
	l.conn.SetDeadline(time.Now().Add(timeout))
	s, err := l.in.ReadString('\n')
	return strings.TrimRight(s, "\r\n"), err
}

// QMP runs a QMP command, and returns what it returns. Args is what
// encoding/json can write as an object, or nil.
func (m *Machine) QMP(command string, args any) (json.RawMessage, error) {
	req := map[string]any{"execute": command}
	if args != nil {
		req["arguments"] = args
	}
	b, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	if _, err := m.qmp.conn.Write(append(b, '\n')); err != nil {
		return nil, m.died(err)
	}
	for {
		s, err := m.qmp.read()
		if err != nil {
			return nil, m.died(err)
		}
		var r struct {
			Return json.RawMessage
			Error  *struct{ Class, Desc string }
			Event  string
		}
		if err := json.Unmarshal([]byte(s), &r); err != nil {
			return nil, fmt.Errorf("QMP %s: %q: %w", command, s, err)
		}
		switch {
		case r.Event != "":
		case r.Error != nil:
			return nil, fmt.Errorf("QMP %s: %s: %s", command, r.Error.Class, r.Error.Desc)
		default:
			return r.Return, nil
		}
	}
}

// HMP runs a command of the human monitor, and returns what it prints.
func (m *Machine) HMP(command string) (string, error) {
	raw, err := m.QMP("human-monitor-command", map[string]string{"command-line": command})
	if err != nil {
		return "", err
	}
	var s string
	err = json.Unmarshal(raw, &s)
	return s, err
}

// Do sends a command of the qtest protocol, and returns the words behind
// "OK".
func (m *Machine) Do(format string, args ...any) ([]string, error) {
	command := fmt.Sprintf(format, args...)
	m.test.conn.SetDeadline(time.Now().Add(timeout))
	if _, err := m.test.conn.Write([]byte(command + "\n")); err != nil {
		return nil, m.died(err)
	}
	for {
		s, err := m.test.read()
		if err != nil {
			return nil, m.died(err)
		}
		words := strings.Fields(s)
		switch {
		case len(words) == 0 || words[0] == "IRQ":
		case words[0] == "OK":
			return words[1:], nil
		default:
			return nil, fmt.Errorf("qtest %s: %s", command, s)
		}
	}
}

func (m *Machine) number(format string, args ...any) (uint64, error) {
	words, err := m.Do(format, args...)
	if err != nil {
		return 0, err
	}
	if len(words) != 1 {
		return 0, fmt.Errorf("qtest "+format+": %q", append(args, words)...)
	}
	return strconv.ParseUint(words[0], 0, 64)
}

// letters of the protocol's commands, by width in bits.
func letter(bits int) string { return map[int]string{8: "b", 16: "w", 32: "l", 64: "q"}[bits] }

// Read reads 8, 16, 32 or 64 bits of memory or of a register in memory.
func (m *Machine) Read(bits int, addr uint64) (uint64, error) {
	return m.number("read%s %#x", letter(bits), addr)
}

// Write writes 8, 16, 32 or 64 bits.
func (m *Machine) Write(bits int, addr, value uint64) error {
	_, err := m.Do("write%s %#x %#x", letter(bits), addr, value)
	return err
}

// In reads 8, 16 or 32 bits of an x86 port.
func (m *Machine) In(bits int, port uint16) (uint64, error) {
	return m.number("in%s %#x", letter(bits), port)
}

// Out writes 8, 16 or 32 bits to an x86 port.
func (m *Machine) Out(bits int, port uint16, value uint64) error {
	_, err := m.Do("out%s %#x %#x", letter(bits), port, value)
	return err
}

// ReadBytes reads memory.
func (m *Machine) ReadBytes(addr uint64, n int) ([]byte, error) {
	words, err := m.Do("read %#x %#x", addr, n)
	if err != nil {
		return nil, err
	}
	return hex.DecodeString(strings.TrimPrefix(strings.Join(words, ""), "0x"))
}

// WriteBytes writes memory.
func (m *Machine) WriteBytes(addr uint64, p []byte) error {
	_, err := m.Do("write %#x %#x 0x%x", addr, len(p), p)
	return err
}
