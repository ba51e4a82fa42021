package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The data channel: TPM commands and responses, one after the other, over a
// unix socket, TCP, or a descriptor that QEMU hands over. A TPM 2.0's command
// may have swtpm's header in front (TPM2_SEND_COMMAND, with the locality); the
// response then has its size in front and four zeros behind it.

const (
	sendCommand = 8
	// stallLimit is how long the rest of a command may take to arrive. A
	// machine's own TPM driver writes it at once.
	stallLimit = 10 * time.Second
	// yieldAfter is how long commands are answered without a pass through Go's
	// scheduler.
	yieldAfter = 4 * time.Millisecond
)

// A stream is a connection in blocking mode, of which the runtime's poller
// knows nothing: a thread that waits in read is woken by the command itself, and
// no other is.
type stream struct{ fd int }

// newStream takes a connection over: conn is closed. While it were open the
// poller would have it, and each command and each response would wake a thread
// that waits for others.
func newStream(conn net.Conn) (*stream, error) {
	defer conn.Close()
	f, ok := conn.(interface{ File() (*os.File, error) })
	if !ok {
		return nil, fmt.Errorf("a data channel on %T", conn)
	}
	dup, err := f.File()
	if err != nil {
		return nil, err
	}
	defer dup.Close()
	fd, err := unix.FcntlInt(dup.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	s := &stream{fd}
	if err := errors.Join(unix.SetNonblock(fd, false), s.limit(unix.SO_SNDTIMEO, stallLimit)); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *stream) limit(option int, d time.Duration) error {
	tv := unix.NsecToTimeval(int64(d))
	return unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, option, &tv)
}

func (s *stream) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(s.fd, p)
		switch {
		case err == nil && n > 0:
			return n, nil
		case err == nil:
			return 0, io.EOF
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return 0, os.ErrDeadlineExceeded
		default:
			return 0, err
		}
	}
}

func (s *stream) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n, err := unix.Write(s.fd, p[done:])
		switch {
		case err == nil:
			done += n
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return done, os.ErrDeadlineExceeded
		default:
			return done, err
		}
	}
	return done, nil
}

// closeRead ends a Read that waits, and those after it.
func (s *stream) closeRead() { _ = unix.Shutdown(s.fd, unix.SHUT_RD) }

func (s *stream) close() error { return unix.Close(s.fd) }

// A commandReader reads commands, as a rule each by one read.
type commandReader struct {
	s    *stream
	tpm2 bool
	buf  []byte // as large as a command can be, and its header
	have int    // bytes in it
	done int    // of them, the command's that was returned last
}

func newCommandReader(s *stream, tpm2 bool, most int) *commandReader {
	return &commandReader{s: s, tpm2: tpm2, buf: make([]byte, most+sendHeader)}
}

// sendHeader is the length of swtpm's header: the command's number, locality
// and size.
const sendHeader = 9

// next returns one command, which is there until next is called again. Locality
// is not nil if it had swtpm's header in front.
func (r *commandReader) next() (cmd []byte, locality *byte, err error) {
	r.have, r.done = copy(r.buf, r.buf[r.done:r.have]), 0
	if r.have == 0 {
		n, err := r.s.Read(r.buf) // between commands: without limit, and the end is no error
		if err != nil {
			return nil, nil, err
		}
		r.have = n
	}
	if err := r.fill(headerLen); err != nil {
		return nil, nil, err
	}
	be := binary.BigEndian
	skip, size := 0, be.Uint32(r.buf[2:])
	if tag := be.Uint16(r.buf); r.tpm2 && tag != stNoSession && tag != stSessions && be.Uint32(r.buf) == sendCommand {
		l := r.buf[4]
		locality, skip, size = &l, sendHeader, be.Uint32(r.buf[5:])
	}
	if most := len(r.buf) - sendHeader; size < headerLen || int64(size) > int64(most) {
		return nil, nil, fmt.Errorf("a command of %d bytes, and %d are possible", size, most)
	}
	end := skip + int(size)
	if err := r.fill(end); err != nil {
		return nil, nil, err
	}
	r.done = end
	return r.buf[skip:end], locality, nil
}

// fill waits for the rest of what has begun to arrive.
func (r *commandReader) fill(n int) error {
	if r.have >= n {
		return nil
	}
	if err := r.s.limit(unix.SO_RCVTIMEO, stallLimit); err != nil {
		return err
	}
	for end := time.Now().Add(stallLimit); r.have < n; {
		if time.Now().After(end) {
			return os.ErrDeadlineExceeded
		}
		k, err := r.s.Read(r.buf[r.have:])
		if err != nil {
			return unexpected(err)
		}
		r.have += k
	}
	return r.s.limit(unix.SO_RCVTIMEO, 0)
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// serveData answers commands until the peer hangs up. once ends it after one.
func (e *engine) serveData(s *stream, once bool) error {
	most := 0
	e.do(func() { most = e.lib.MaxBuffer(e.tpm2) })
	in := newCommandReader(s, e.tpm2, most)
	yielded := time.Now()
	for {
		// The runtime takes the processor away from a goroutine that it hasn't
		// scheduled for 10 ms, at the next system call and each after it. A
		// command would then wake the runtime's monitor, which is another
		// thread, before it is executed.
		if now := time.Now(); now.Sub(yielded) >= yieldAfter {
			yielded = now
			runtime.Gosched()
		}
		cmd, locality, err := in.next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		rsp := e.process(cmd, locality)
		if locality != nil {
			size := binary.BigEndian.AppendUint32(nil, uint32(len(rsp)))
			rsp = append(append(size, rsp...), 0, 0, 0, 0)
		}
		if _, err := s.Write(rsp); err != nil {
			return err
		}
		if once {
			return nil
		}
	}
}

// A dataChannel has one connection at a time.
type dataChannel struct {
	e    *engine
	once bool
	end  func() // called when a connection ends; may be nil

	mu   sync.Mutex
	conn *stream
	wg   sync.WaitGroup
}

// adopt takes a descriptor that came over the control channel.
func (d *dataChannel) adopt(f *os.File) bool {
	d.mu.Lock()
	busy := d.conn != nil
	d.mu.Unlock()
	if busy {
		return false
	}
	conn, err := net.FileConn(f)
	if err != nil {
		d.e.log.printf("error: the data channel's descriptor: %v", err)
		return false
	}
	f.Close() // FileConn has its own
	d.run(conn)
	return true
}

// run serves a connection in the background.
func (d *dataChannel) run(conn net.Conn) {
	s, err := newStream(conn)
	if err != nil {
		d.ended(err)
		return
	}
	d.mu.Lock()
	d.conn = s
	d.mu.Unlock()
	d.wg.Add(1)
	go func() {
		defer d.wg.Done()
		err := d.e.serveData(s, d.once)
		d.mu.Lock()
		d.conn = nil // before another file has its number
		d.mu.Unlock()
		d.ended(errors.Join(err, s.close()))
	}()
}

func (d *dataChannel) ended(err error) {
	if err != nil {
		d.e.log.printf("data channel: %v", err)
	}
	if d.end != nil {
		d.end()
	}
}

// accept serves one connection after another.
func (d *dataChannel) accept(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				d.e.log.printf("error: data channel: %v", err)
			}
			return
		}
		d.run(conn)
		d.wg.Wait()
	}
}

// close ends the connection, and waits until the command that runs has been
// answered.
func (d *dataChannel) close() {
	d.mu.Lock()
	if d.conn != nil {
		d.conn.closeRead() // no more commands; the response still goes out
	}
	d.mu.Unlock()
	d.wg.Wait()
}
