package control_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"nvstore.dev/tpmstate"
	"nvstore.dev/tpmstate/control"
)

// A fake records what is asked of it.
type fake struct {
	mu      sync.Mutex // of calls: the test and the server look at them in turn
	running bool
	calls   []string
	state   [3][]byte
	data    *os.File
}

func (f *fake) call(format string, args ...any) control.Result {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, fmt.Sprintf(format, args...))
	return control.Success
}

// taken returns what was called, and forgets it.
func (f *fake) taken() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	list := f.calls
	f.calls = nil
	return list
}

func (f *fake) Start(del bool) control.Result { f.running = true; return f.call("start %v", del) }
func (f *fake) Stop()                         { f.running = false; f.call("stop") }
func (f *fake) Running() bool                 { return f.running }
func (f *fake) Established() (bool, control.Result) {
	return true, f.call("established")
}
func (f *fake) ResetEstablished(l byte) control.Result { return f.call("reset established %d", l) }
func (f *fake) SetLocality(l byte) control.Result {
	if l > 4 {
		return control.BadLocality
	}
	return f.call("locality %d", l)
}
func (f *fake) HashStart() control.Result            { return f.call("hash start") }
func (f *fake) HashData(p []byte) control.Result     { return f.call("hash %d", len(p)) }
func (f *fake) HashEnd() control.Result              { return f.call("hash end") }
func (f *fake) Cancel() control.Result               { return f.call("cancel") }
func (f *fake) StoreVolatile() control.Result        { return f.call("volatile") }
func (f *fake) LockStorage(n uint32) control.Result  { return f.call("lock %d", n) }
func (f *fake) Info(flags uint64) string             { return strings.Repeat("x", int(min(flags, 10000))) }
func (f *fake) Keys() (bool, bool)                   { return true, true }
func (f *fake) BufferSize(n uint32) (a, b, c uint32) { f.call("buffer %d", n); return 3968, 2048, 4096 }
func (f *fake) State(k tpmstate.Kind, decrypted bool) ([]byte, bool, control.Result) {
	return f.state[k], !decrypted, f.call("state %v %v", k, decrypted)
}
func (f *fake) SetState(k tpmstate.Kind, p []byte, encrypted bool) control.Result {
	f.state[k] = p
	return f.call("set state %v %d %v", k, len(p), encrypted)
}
func (f *fake) Data(file *os.File) bool {
	if f.data != nil {
		return false
	}
	f.data = file
	return true
}

// dial serves f on a unix socket.
func dial(t testing.TB, f *fake) (*net.UnixConn, chan error) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	ended := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		l.Close()
		if err != nil {
			ended <- err
			return
		}
		ended <- (&control.Server{TPM: f, TPM2: true}).Serve(conn)
	}()
	conn, err := net.Dial("unix", path)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	return conn.(*net.UnixConn), ended
}

func words(list ...uint32) []byte {
	var b []byte
	for _, w := range list {
		b = binary.BigEndian.AppendUint32(b, w)
	}
	return b
}

// ask sends a message and reads a reply of n bytes.
func ask(t testing.TB, conn net.Conn, msg []byte, n int) []byte {
	t.Helper()
	_, err := conn.Write(msg)
	require.NoError(t, err)
	b := make([]byte, n)
	_, err = io.ReadFull(conn, b)
	require.NoError(t, err)
	return b
}

func TestCommands(t *testing.T) {
	f := &fake{}
	conn, ended := dial(t, f)
	expect := func(msg, reply []byte, call string) {
		t.Helper()
		f.taken()
		require.Equal(t, reply, ask(t, conn, msg, len(reply)), "%v", control.Command(binary.BigEndian.Uint32(msg)))
		require.Equal(t, call, strings.Join(f.taken(), ", "))
	}
	ok, notNow := words(0), words(10)
	expect(words(1), words(0, 0x1ffff), "")
	// Before INIT. What belongs to a command is read all the same, so that
	// the next one is understood.
	for _, msg := range [][]byte{words(4), words(6), words(7, 5)[:8], words(8), words(9), words(0xa), append(words(0xb), 1), words(0xc, 1, 1, 0)} {
		if msg[3] == 7 {
			msg = append(msg, "hello"...)
		}
		expect(msg, notNow, "")
	}
	expect(append(words(0xd, 0, 1, 3), "one"...), ok, "set state permanent 3 false")
	expect(words(0xd, 2, 2, 0), ok, "set state volatile 0 true")
	expect(words(0xd, 0, 4, 0), words(3), "")
	expect(words(0xd, 0, 0, 0), words(3), "")
	expect(words(0x11, 3968), words(0, 3968, 2048, 4096), "buffer 3968")
	expect(words(2, 1), ok, "start true")
	// Of a running TPM.
	expect(words(0xd, 0, 1, 0), notNow, "")
	expect(words(0x11, 3968), notNow, "")
	expect(words(0x11, 0), words(0, 3968, 2048, 4096), "buffer 0")
	expect(words(4), append(words(0), 1, 0, 0, 0), "established")
	expect(append(words(5), 3), ok, "locality 3")
	expect(append(words(5), 2, 0xff, 0xff, 0xff), ok, "locality 2") // as QEMU, with padding
	expect(append(words(5), 5), words(61), "")
	expect(append(words(0xb), 4, 0, 0, 0), ok, "reset established 4")
	expect(words(6), ok, "hash start")
	expect(append(words(7, 5), "hello"...), ok, "hash 5")
	expect(words(7, 0), ok, "")
	expect(append(words(7, 1<<17+1), make([]byte, 1<<17+1)...), ok, "hash 65536, hash 65536, hash 1")
	expect(words(8), ok, "hash end")
	expect(words(9), ok, "cancel")
	expect(words(0xa), ok, "volatile")
	expect(words(0xc, 1, 1, 0), append(words(0, 0, 3, 3), "one"...), "state permanent true")
	expect(words(0xc, 0, 1, 1), append(words(0, 2, 2, 2), "ne"...), "state permanent false")
	expect(words(0xc, 0, 1, 1<<32-1), words(0, 2, 0, 0), "state permanent false")
	expect(words(0xc, 1, 3, 0), words(0, 0, 0, 0), "state savestate true")
	expect(words(0xc, 1, 4, 0), words(3, 0, 0, 0), "")
	expect(words(0xf), words(0, 3), "")
	expect(words(0x12, 0, 5, 0, 0), append(words(0, 6, 6), "xxxxx\x00"...), "")
	expect(words(0x12, 0, 5, 3, 0), append(words(0, 6, 3), "xx\x00"...), "")
	expect(words(0x12, 0, 5, 5, 0), words(3), "")
	expect(words(0x13, 7), ok, "lock 7")
	expect(words(0x99), notNow, "")
	expect(words(0x10), words(3), "") // no descriptor
	expect(words(0xe), ok, "stop")
	expect(words(3), ok, "stop")
	require.ErrorIs(t, <-ended, control.ErrShutdown)
}

func TestDataDescriptor(t *testing.T) {
	f := &fake{}
	conn, _ := dial(t, f)
	r, w, err := os.Pipe()
	require.NoError(t, err)
	defer r.Close()
	send := func() []byte {
		_, _, err := conn.WriteMsgUnix(words(0x10), unix.UnixRights(int(w.Fd())), nil)
		require.NoError(t, err)
		b := make([]byte, 4)
		_, err = io.ReadFull(conn, b)
		require.NoError(t, err)
		return b
	}
	require.Equal(t, words(0), send())
	_, err = f.data.WriteString("hello")
	require.NoError(t, err)
	b := make([]byte, 5)
	_, err = io.ReadFull(r, b)
	require.NoError(t, err)
	require.Equal(t, "hello", string(b))
	require.Equal(t, words(31), send(), "there is one already")
	// A descriptor with a command that takes none is closed.
	_, _, err = conn.WriteMsgUnix(words(1), unix.UnixRights(int(w.Fd())), nil)
	require.NoError(t, err)
	ask(t, conn, nil, 8)
	ask(t, conn, words(1), 8)
	require.NoError(t, w.Close())
	require.NoError(t, f.data.Close())
	_, err = r.Read(b)
	require.ErrorIs(t, err, io.EOF, "somebody has the pipe's end")
}

// TestStall: a peer that goes silent in the middle of a message holds nothing
// up, and one that hangs up is no error.
func TestStall(t *testing.T) {
	conn, ended := dial(t, &fake{})
	_, err := conn.Write([]byte{0, 0})
	require.NoError(t, err)
	require.ErrorIs(t, <-ended, os.ErrDeadlineExceeded)
	conn, ended = dial(t, &fake{})
	_, err = conn.Write(words(2)) // INIT without flags
	require.NoError(t, err)
	require.ErrorIs(t, <-ended, os.ErrDeadlineExceeded)
	conn, ended = dial(t, &fake{})
	_, err = conn.Write([]byte{0, 0})
	require.NoError(t, err)
	conn.Close()
	require.ErrorIs(t, <-ended, io.ErrUnexpectedEOF)
	conn, ended = dial(t, &fake{})
	conn.Close()
	require.NoError(t, <-ended)
}

// TestTooMuch: lengths are looked at before anything is allocated.
func TestTooMuch(t *testing.T) {
	for _, msg := range [][]byte{words(0xd, 0, 1, tpmstate.MaxState+1), words(0xd, 0, 1, 1<<32-1), words(7, 1<<32-1)} {
		f := &fake{running: msg[3] == 7}
		conn, ended := dial(t, f)
		_, err := conn.Write(msg)
		require.NoError(t, err)
		require.Error(t, <-ended)
		require.Empty(t, f.taken())
	}
}

func FuzzServer(f *testing.F) {
	f.Add(append(words(1), words(2, 0, 3)...))
	f.Add(append(words(0xd, 0, 1, 3), "onexx"...))
	f.Add(append(append(words(2, 0), append(words(7, 5), "hello"...)...), words(8)...))
	f.Add(append(append(words(5), 3), words(0xc, 1, 1, 0)...))
	f.Fuzz(func(t *testing.T, p []byte) {
		// net.Pipe has no descriptors, and is quicker.
		ours, theirs := net.Pipe()
		go io.Copy(io.Discard, ours)
		go func() {
			ours.Write(p)
			ours.Close()
		}()
		fake := &fake{}
		err := (&control.Server{TPM: fake, TPM2: true}).Serve(theirs)
		if err != nil && errors.Is(err, io.EOF) {
			t.Fatalf("%v: an end between messages is no error", err)
		}
		total := 0
		for _, s := range fake.state {
			total += len(s)
		}
		require.LessOrEqual(t, total, 3*tpmstate.MaxState)
	})
}
