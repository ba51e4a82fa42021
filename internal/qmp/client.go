package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"
)

// Options for Dial. Nil is the zero value.
type Options struct {
	// Timeout bounds each command whose context has no deadline, and the
	// greeting; 0 is 30 s.
	Timeout time.Duration

	// MaxMessage bounds a message from QEMU, in bytes; 0 is 16 MiB. The
	// largest that QEMU sends, its schema, has 300 KiB.
	MaxMessage int
}

// maxPending bounds commands that wait for answers, with those whose callers
// gave up.
const maxPending = 256

// eventBuffer is how many events a subscriber may be behind.
const eventBuffer = 256

// A Version is QEMU's.
type Version struct {
	Major, Minor, Micro int
	Package             string
}

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro) }

// A Client is a connection to a monitor. It may be used by many goroutines.
type Client struct {
	conn    net.Conn
	in      *bufio.Reader
	opts    Options
	version Version
	ended   chan struct{}

	writing sync.Mutex

	mu      sync.Mutex
	next    uint64
	pending map[uint64]chan message // nil for those that nobody waits for
	subs    map[*Subscription]struct{}
	err     error // why it ended
}

// A message is whatever QEMU sends.
type message struct {
	QMP *struct {
		Version *struct {
			QEMU    *struct{ Major, Minor, Micro int }
			Package string
		}
		Capabilities []json.RawMessage
	}
	ID        *uint64
	Return    json.RawMessage
	Error     *struct{ Class, Desc string }
	Event     string
	Data      json.RawMessage
	Timestamp struct{ Seconds, Microseconds int64 }
}

// Dial connects to a monitor: the path of a unix socket, or in QEMU's notation
// "unix:PATH" or "tcp:HOST:PORT". ctx bounds the handshake only.
func Dial(ctx context.Context, address string, o *Options) (*Client, error) {
	network, addr := "unix", address
	if rest, ok := strings.CutPrefix(address, "tcp:"); ok {
		network, addr = "tcp", rest
	} else if rest, ok := strings.CutPrefix(address, "unix:"); ok {
		addr = rest
	}
	opts := o.filled()
	ctx, cancel := context.WithTimeout(ctx, opts.Timeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", address, err)
	}
	c, err := New(ctx, conn, o)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", address, err)
	}
	return c, nil
}

func (o *Options) filled() Options {
	var f Options
	if o != nil {
		f = *o
	}
	if f.Timeout <= 0 {
		f.Timeout = 30 * time.Second
	}
	if f.MaxMessage <= 0 {
		f.MaxMessage = 16 << 20
	}
	return f
}

// New speaks QMP on a connection, which belongs to the Client from then on, and
// is closed if there is an error. ctx bounds the handshake only.
func New(ctx context.Context, conn net.Conn, o *Options) (*Client, error) {
	c := &Client{conn: conn, in: bufio.NewReader(conn), opts: o.filled(), ended: make(chan struct{}),
		pending: make(map[uint64]chan message), subs: make(map[*Subscription]struct{})}
	ctx, cancel := context.WithTimeout(ctx, c.opts.Timeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	err := c.greeting()
	if !stop() || ctx.Err() != nil {
		// A monitor that has a client takes others' connections, and
		// greets them when the first one leaves.
		if err = ctx.Err(); err == context.DeadlineExceeded {
			err = fmt.Errorf("%w: no greeting: another client may hold it", ErrBusy)
		}
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	go c.read()
	if err := c.Do(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Client) greeting() error {
	m, err := c.receive()
	if err != nil {
		return err
	}
	if m.QMP == nil || m.QMP.Version == nil || m.QMP.Version.QEMU == nil {
		return fmt.Errorf("%w: no greeting", ErrProtocol)
	}
	v := m.QMP.Version
	c.version = Version{v.QEMU.Major, v.QEMU.Minor, v.QEMU.Micro, v.Package}
	return nil
}

// receive reads one message.
func (c *Client) receive() (*message, error) {
	var line []byte
	for {
		part, err := c.in.ReadSlice('\n')
		if len(line)+len(part) > c.opts.MaxMessage {
			return nil, fmt.Errorf("%w: a message of more than %d bytes", ErrProtocol, c.opts.MaxMessage)
		}
		line = append(line, part...)
		if err == nil {
			break
		}
		if err == io.EOF && len(line) > 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != bufio.ErrBufferFull {
			return nil, fmt.Errorf("%w: %w", ErrDisconnected, err)
		}
	}
	return parse(line)
}

func parse(line []byte) (*message, error) {
	m := new(message)
	if err := json.Unmarshal(line, m); err != nil {
		return nil, fmt.Errorf("%w: %w: %.60q", ErrProtocol, err, line)
	}
	kinds := 0
	for _, is := range []bool{m.QMP != nil, m.Return != nil, m.Error != nil, m.Event != ""} {
		if is {
			kinds++
		}
	}
	if kinds != 1 {
		return nil, fmt.Errorf("%w: neither a reply nor an event: %.60q", ErrProtocol, line)
	}
	return m, nil
}

// read takes what QEMU sends, until the connection ends.
func (c *Client) read() {
	var err error
	for err == nil {
		var m *message
		if m, err = c.receive(); err == nil {
			err = c.dispatch(m)
		}
	}
	c.conn.Close()
	c.mu.Lock()
	if c.err == nil {
		c.err = err
	}
	for s := range c.subs {
		close(s.events)
	}
	c.subs = nil
	c.mu.Unlock()
	close(c.ended)
}

func (c *Client) dispatch(m *message) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case m.QMP != nil:
		return fmt.Errorf("%w: a second greeting", ErrProtocol)
	case m.Event != "":
		e := Event{Name: m.Event, Data: m.Data, Time: time.Unix(m.Timestamp.Seconds, 0).Add(time.Duration(m.Timestamp.Microseconds%1e6) * time.Microsecond)}
		for s := range c.subs {
			s.take(e)
		}
		return nil
	case m.ID == nil:
		what := "a reply"
		if m.Error != nil {
			what = m.Error.Desc
		}
		return fmt.Errorf("%w: %s without an id", ErrProtocol, what)
	}
	reply, ok := c.pending[*m.ID]
	if !ok {
		return fmt.Errorf("%w: a reply to no command: id %d", ErrProtocol, *m.ID)
	}
	delete(c.pending, *m.ID)
	if reply != nil {
		reply <- *m
	}
	return nil
}

// Version returns QEMU's version.
func (c *Client) Version() Version { return c.version }

// Ended is closed when the connection has ended.
func (c *Client) Ended() <-chan struct{} { return c.ended }

// Err returns why the connection ended, or nil.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close ends the connection. Nothing in QEMU changes by that.
func (c *Client) Close() error {
	c.mu.Lock()
	closed := errors.Is(c.err, net.ErrClosed)
	if c.err == nil {
		c.err = fmt.Errorf("%w: %w", ErrDisconnected, net.ErrClosed)
	}
	c.mu.Unlock()
	if closed {
		return net.ErrClosed
	}
	c.conn.Close()
	<-c.ended
	return nil
}

// Do runs a command, and decodes what it returns into result unless that is
// nil. args is nil or what encodes as an object. What QEMU refuses is an
// *Error. Without a deadline in ctx, the command has the client's timeout; a
// command that wasn't answered in time may still be carried out.
func (c *Client) Do(ctx context.Context, command string, args, result any) error {
	ctx, cancel := c.limit(ctx)
	defer cancel()
	return c.do(ctx, command, args, result, nil)
}

// SendFile gives QEMU a file, by which name later commands find it (getfd). The
// monitor must be a unix socket.
func (c *Client) SendFile(ctx context.Context, name string, f *os.File) error {
	ctx, cancel := c.limit(ctx)
	defer cancel()
	return c.do(ctx, "getfd", map[string]string{"fdname": name}, nil, f)
}

// limit gives a context the client's timeout if it has none.
func (c *Client) limit(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, c.opts.Timeout)
}

// do has no timeout but ctx's.
func (c *Client) do(ctx context.Context, command string, args, result any, f *os.File) error {
	if err := ctx.Err(); err != nil {
		return late(err, command)
	}
	id, reply, err := c.expect()
	if err != nil {
		return err
	}
	if _, ok := c.conn.(*net.UnixConn); f != nil && !ok {
		c.forget(id, true)
		return fmt.Errorf("qmp: %s: a file can be sent over a unix socket only: %w", command, errors.ErrUnsupported)
	}
	if err := c.send(command, args, id, f); err != nil {
		c.forget(id, true)
		return err
	}
	select {
	case m := <-reply:
		return answer(command, &m, result)
	case <-c.ended:
		// The answer may have come before the end.
		select {
		case m := <-reply:
			return answer(command, &m, result)
		default:
			return fmt.Errorf("%s: %w", command, c.Err())
		}
	case <-ctx.Done():
		c.forget(id, false)
		return late(ctx.Err(), command)
	}
}

func answer(command string, m *message, result any) error {
	if m.Error != nil {
		return &Error{Command: command, Class: m.Error.Class, Desc: m.Error.Desc}
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(m.Return, result); err != nil {
		return fmt.Errorf("%w: what %s returns: %w", ErrProtocol, command, err)
	}
	return nil
}

func late(err error, command string) error {
	if err == context.DeadlineExceeded {
		return fmt.Errorf("%w: %s", ErrTimeout, command)
	}
	return err
}

// expect makes room for a reply.
func (c *Client) expect() (uint64, chan message, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, nil, c.err
	}
	if len(c.pending) >= maxPending {
		return 0, nil, fmt.Errorf("%w: %d commands wait for answers", ErrBusy, len(c.pending))
	}
	c.next++
	reply := make(chan message, 1)
	c.pending[c.next] = reply
	return c.next, reply, nil
}

// forget gives a reply up. One that may still come is remembered.
func (c *Client) forget(id uint64, unsent bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if unsent {
		delete(c.pending, id)
	} else if _, ok := c.pending[id]; ok {
		c.pending[id] = nil
	}
}

func (c *Client) send(command string, args any, id uint64, f *os.File) error {
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id})
	if err != nil {
		return fmt.Errorf("qmp: arguments of %s: %w", command, err)
	}
	c.writing.Lock()
	defer c.writing.Unlock()
	c.conn.SetWriteDeadline(time.Now().Add(c.opts.Timeout))
	if err := c.write(append(line, '\n'), f); err != nil {
		// Half a command may be on its way: nothing can follow it.
		c.conn.Close()
		<-c.ended
		return fmt.Errorf("%w: %w", ErrDisconnected, err)
	}
	return nil
}

// write sends a line, and a file with its first byte.
func (c *Client) write(line []byte, f *os.File) error {
	if f == nil {
		_, err := c.conn.Write(line)
		return err
	}
	n, err := c.writeRights(line, f)
	if err == nil {
		_, err = c.conn.Write(line[n:])
	}
	return err
}
