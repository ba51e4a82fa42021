package tlspsk

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	maxMessage = 32 << 10 // bytes of a handshake message
	maxUseless = 32       // records in a row without content
	// flushAt is how much goes to the network by one write, at most a
	// record more.
	flushAt = 3 * sealedLen
)

var errNoHandshake = errors.New("tlspsk: no handshake")

// A Conn is one end of a connection. Handshake comes first, and alone;
// afterwards, one goroutine may read while another writes.
type Conn struct {
	nc     net.Conn
	shake  func() error // the handshake of this end
	client *clientSide  // or
	keys   map[string][]byte

	established atomic.Bool
	ccs         bool // change_cipher_spec may come
	owed        atomic.Bool

	rmu     sync.Mutex
	in      half
	buf     []byte // what has arrived: buf[begin:end]
	begin   int
	end     int
	hand    []byte // a part of a handshake message, or of several
	plain   []byte // content that nobody has read, in buf
	useless int
	rerr    error

	wmu  sync.Mutex
	out  half
	obuf []byte // sealed, and not written
	werr error
}

func newConn(nc net.Conn) *Conn { return &Conn{nc: nc, buf: make([]byte, 2*(headerLen+maxCipher))} }

// Client is the client's end: it has one key, which goes by identity.
func Client(nc net.Conn, identity string, key []byte) *Conn {
	c := newConn(nc)
	c.client = &clientSide{identity: identity, key: key}
	c.shake = c.clientHandshake
	return c
}

// Server is the server's end: it has the keys of several clients, by their
// identities. It doesn't change the map.
func Server(nc net.Conn, keys map[string][]byte) *Conn {
	c := newConn(nc)
	c.keys = keys
	c.shake = c.serverHandshake
	return c
}

// Handshake makes the connection. Deadlines are those of the net.Conn. What
// the peer did wrong, or has against us, is an *Error. It may be called once.
func (c *Conn) Handshake() error {
	if c.established.Load() {
		return nil
	}
	c.rmu.Lock()
	defer c.rmu.Unlock()
	if c.rerr != nil {
		return c.rerr
	}
	err := c.shake()
	if err != nil {
		return c.broken(err)
	}
	c.established.Store(true)
	return nil
}

// broken ends the reading side by an error, and tells the peer if it is to
// blame. Whoever waits for a peer that reads nothing is left alone.
func (c *Conn) broken(err error) error {
	c.rerr = err
	f := (*Error)(nil)
	if err == io.EOF || !errors.As(err, &f) {
		return err
	}
	if c.wmu.TryLock() {
		defer c.wmu.Unlock()
		if !f.Remote && c.werr == nil {
			_ = c.nc.SetWriteDeadline(time.Now().Add(time.Second))
			c.protect(typeAlert, []byte{2, byte(f.Alert)})
			_ = c.flush()
		}
		c.werr = err
	}
	return err
}

// fill has the first n bytes of the next record arrive.
func (c *Conn) fill(n int) ([]byte, error) {
	if c.begin == c.end || c.begin+n > len(c.buf) {
		c.end = copy(c.buf, c.buf[c.begin:c.end])
		c.begin = 0
	}
	for c.end-c.begin < n {
		m, err := c.nc.Read(c.buf[c.end:])
		c.end += m
		if err != nil && c.end-c.begin < n {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF // close_notify is missing
			}
			return nil, err
		}
	}
	return c.buf[c.begin : c.begin+n], nil
}

// record returns the next record that has a message or content. What it
// returns is good until the next call.
func (c *Conn) record() (typ byte, data []byte, err error) {
	for {
		header, err := c.fill(headerLen)
		if err != nil {
			return 0, nil, err
		}
		typ, n := header[0], int(binary.BigEndian.Uint16(header[3:]))
		if typ < typeChangeCipherSpec || typ > typeData {
			return 0, nil, fault(unexpectedMessage, "a record of an unknown type: this may be no TLS")
		}
		if n > maxCipher || n > maxPlain && c.in.aead == nil {
			return 0, nil, fault(recordOverflow, "a record of more than 2^14 bytes")
		}
		whole, err := c.fill(headerLen + n)
		if err != nil {
			return 0, nil, err
		}
		c.begin += len(whole)
		header, data = whole[:headerLen], whole[headerLen:]
		if typ == typeChangeCipherSpec {
			if err := c.middlebox(data); err != nil {
				return 0, nil, err
			}
			continue
		}
		switch {
		case c.in.aead == nil:
			// In the clear there are handshake messages and alerts.
		case typ == typeData:
			if typ, data, err = c.in.open(header, data); err != nil {
				return 0, nil, err
			}
		case typ == typeAlert && !c.established.Load():
			// From a peer that couldn't derive keys.
		default:
			return 0, nil, fault(unexpectedMessage, "a record in the clear")
		}
		done, err := c.judge(typ, data)
		if done || err != nil {
			return typ, data, err
		}
	}
}

// middlebox takes a change_cipher_spec record, which means nothing (section
// 5).
func (c *Conn) middlebox(data []byte) error {
	if !c.ccs || len(data) != 1 || data[0] != 1 || len(c.hand) > 0 {
		return fault(unexpectedMessage, "change_cipher_spec where none may be")
	}
	return c.idle()
}

// idle counts a record without content.
func (c *Conn) idle() error {
	if c.useless++; c.useless > maxUseless {
		return fault(unexpectedMessage, "too many records without content")
	}
	return nil
}

// judge takes alerts and empty records. done tells that the record is
// something else.
func (c *Conn) judge(typ byte, data []byte) (done bool, err error) {
	if typ != typeHandshake && len(c.hand) > 0 {
		return false, fault(unexpectedMessage, "a record between the parts of a message")
	}
	switch typ {
	case typeAlert:
		return false, c.alerted(data)
	case typeHandshake:
		if len(data) == 0 {
			return false, fault(unexpectedMessage, "an empty handshake record")
		}
		return true, nil
	case typeData:
		if !c.established.Load() {
			return false, fault(unexpectedMessage, "content before the handshake is over")
		}
		if len(data) == 0 {
			return false, c.idle()
		}
		return true, nil
	}
	return false, fault(unexpectedMessage, "a record of an unknown type")
}

// alerted takes an alert (section 6). Its level says nothing in TLS 1.3.
func (c *Conn) alerted(data []byte) error {
	if len(data) != 2 {
		return malformed("alert")
	}
	switch a := Alert(data[1]); {
	case a == userCanceled:
		return c.idle() // close_notify follows
	case a == closeNotify && c.established.Load():
		return io.EOF
	case c.established.Load():
		return &Error{Alert: a, Remote: true}
	default:
		f := &Error{Alert: a, Remote: true}
		switch a {
		case decryptError, unknownPSKIdentity, illegalParameter, accessDenied, missingExtension, handshakeFailure:
			// What peers say of a binder, or if they'd rather have a certificate.
			f.reason = "it may not know the identity, or have another key for it"
		}
		return f
	}
}

// whole tells whether a handshake message has arrived, and how long it is.
func (c *Conn) whole() (n int, ok bool, err error) {
	if len(c.hand) < 4 {
		return 0, false, nil
	}
	n = 4 + int(c.hand[1])<<16 + int(c.hand[2])<<8 + int(c.hand[3])
	if n > maxMessage {
		return 0, false, fault(illegalParameter, "a handshake message of more than 32 KiB")
	}
	return n, len(c.hand) >= n, nil
}

// message returns the next handshake message, which must be of one type.
func (c *Conn) message(want byte) ([]byte, error) {
	for {
		n, ok, err := c.whole()
		if err != nil {
			return nil, err
		}
		if len(c.hand) > 0 && c.hand[0] != want {
			return nil, fault(unexpectedMessage, "another handshake message than the one that is due")
		}
		if ok {
			msg := c.hand[:n:n]
			c.hand = c.hand[n:]
			return msg, nil
		}
		typ, data, err := c.record()
		if err != nil {
			return nil, err
		}
		if typ != typeHandshake {
			return nil, fault(unexpectedMessage, "no handshake message")
		}
		c.hand = append(c.hand, data...)
	}
}

// boundary is where keys change: no message may cross it (section 5.1).
func (c *Conn) boundary() error {
	if len(c.hand) > 0 {
		return fault(unexpectedMessage, "a message that goes on after a change of keys")
	}
	c.hand = nil
	return nil
}

// Read returns what the peer wrote. io.EOF means that it said so: what ends
// without is io.ErrUnexpectedEOF. After a timeout one may go on.
func (c *Conn) Read(p []byte) (int, error) {
	if !c.established.Load() {
		return 0, errNoHandshake
	}
	c.rmu.Lock()
	defer c.rmu.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	for len(c.plain) == 0 {
		if c.rerr != nil {
			return 0, c.rerr
		}
		if err := c.receive(); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return 0, err
			}
			return 0, c.broken(err)
		}
	}
	n := copy(p, c.plain)
	c.plain = c.plain[n:]
	return n, nil
}

// receive takes one record.
func (c *Conn) receive() error {
	typ, data, err := c.record()
	if err != nil {
		return err
	}
	if typ == typeData {
		c.plain, c.useless = data, 0
		return nil
	}
	c.hand = append(c.hand, data...)
	if err := c.idle(); err != nil {
		return err
	}
	for {
		n, ok, err := c.whole()
		if !ok || err != nil {
			return err
		}
		msg := c.hand[:n]
		c.hand = c.hand[n:]
		if err := c.late(msg); err != nil {
			return err
		}
	}
}

// late takes a message that comes after the handshake (section 4.6).
func (c *Conn) late(msg []byte) error {
	switch {
	case msg[0] == typeNewSessionTicket && c.client != nil:
		return nil // there is no resumption
	case msg[0] == typeKeyUpdate:
		if len(msg) != 5 {
			return malformed("KeyUpdate")
		}
		if msg[4] > 1 {
			return fault(illegalParameter, "a KeyUpdate that asks for neither")
		}
		if err := c.boundary(); err != nil {
			return err
		}
		c.in.update()
		if msg[4] == 1 {
			// The reader must not wait for the peer to read, so it is
			// the next Write that answers.
			c.owed.Store(true)
		}
		return nil
	}
	return fault(unexpectedMessage, "a handshake message after the handshake")
}

// Write sends p. After an error, nothing more can be sent.
func (c *Conn) Write(p []byte) (n int, err error) {
	if !c.established.Load() {
		return 0, errNoHandshake
	}
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if c.werr != nil {
		return 0, c.werr
	}
	for sealed := 0; n < len(p); {
		if c.owed.Swap(false) || c.out.seq >= rekeyAfter {
			c.rekey()
		}
		m := min(len(p)-sealed, maxPlain)
		c.protect(typeData, p[sealed:sealed+m])
		sealed += m
		if sealed == len(p) || len(c.obuf) >= flushAt {
			if err := c.flush(); err != nil {
				return n, err
			}
			n = sealed
		}
	}
	return n, nil
}

// rekey changes the keys that we write under (section 4.6.3).
func (c *Conn) rekey() {
	c.protect(typeHandshake, []byte{typeKeyUpdate, 0, 0, 1, 0})
	c.out.update()
}

// protect seals a record, which flush sends.
func (c *Conn) protect(typ byte, data []byte) { c.obuf = c.out.seal(c.obuf, typ, data) }

func (c *Conn) flush() error {
	if c.werr == nil {
		_, c.werr = c.nc.Write(c.obuf)
	}
	c.obuf = c.obuf[:0]
	return c.werr
}

// Close says that nothing more comes, unless that would have to wait for a
// Write, and closes the net.Conn.
func (c *Conn) Close() error {
	if c.established.Load() && c.wmu.TryLock() {
		if c.werr == nil {
			_ = c.nc.SetWriteDeadline(time.Now().Add(time.Second))
			c.protect(typeAlert, []byte{1, byte(closeNotify)})
			_ = c.flush()
			c.werr = net.ErrClosed
		}
		c.wmu.Unlock()
	}
	return c.nc.Close()
}

// The rest is the net.Conn's.

func (c *Conn) LocalAddr() net.Addr                { return c.nc.LocalAddr() }
func (c *Conn) RemoteAddr() net.Addr               { return c.nc.RemoteAddr() }
func (c *Conn) SetDeadline(t time.Time) error      { return c.nc.SetDeadline(t) }
func (c *Conn) SetReadDeadline(t time.Time) error  { return c.nc.SetReadDeadline(t) }
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.nc.SetWriteDeadline(t) }
