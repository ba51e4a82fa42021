package nbd

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"time"
)

// errBye ends a session as the client wishes.
var errBye = errors.New("the client disconnects")

// maxOptions bounds a handshake, as its timeout does.
const maxOptions = 1024

// maxOptionData is what an option that is understood can need. More is read
// and dropped.
const maxOptionData = 64 << 10

// A session is one client's connection, from the server's side.
type session struct {
	server *Server
	peer   string
	nc     net.Conn
	raw    net.Conn // below TLS: closing it never waits
	br     *bufio.Reader
	ended  chan struct{}

	// What the handshake settles.
	fixed, noZeroes bool
	tls             bool
	structured      bool
	meta            string // the export that base:allocation was chosen for
	hasMeta         bool
	export          *export // under server.mu until transmission

	transmission
	draining atomic.Bool
}

func newSession(s *Server, nc net.Conn) *session {
	return &session{server: s, peer: peerName(nc), nc: nc, raw: nc, ended: make(chan struct{}),
		br: bufio.NewReaderSize(nc, serverBuffer)}
}

// peerName is a client's address, if it has one.
func peerName(nc net.Conn) string {
	if a := nc.RemoteAddr(); a != nil && a.String() != "" && a.String() != "@" {
		return a.String()
	}
	return "client"
}

// drain has the session end when it has answered what has arrived.
func (c *session) drain() {
	c.draining.Store(true)
	_ = c.raw.SetReadDeadline(time.Unix(1, 0))
}

// run is the whole session.
func (c *session) run() error {
	defer c.raw.Close()
	err := c.handshake()
	if err == nil {
		err = c.transmit()
	}
	switch {
	case errors.Is(err, errBye), err == io.EOF, c.draining.Load() && isTimeout(err):
		err = nil
	}
	if c.tls && err == nil {
		_ = c.nc.SetWriteDeadline(time.Now().Add(time.Second))
		_ = c.nc.Close() // says goodbye
	}
	return err
}

func isTimeout(err error) bool {
	ne := net.Error(nil)
	return errors.As(err, &ne) && ne.Timeout()
}

func (c *session) handshake() error {
	deadline := time.Now().Add(c.server.opts.HandshakeTimeout)
	if err := c.raw.SetDeadline(deadline); err != nil {
		return err
	}
	if c.draining.Load() {
		return errBye
	}
	err := c.haggle()
	if err != nil {
		if isTimeout(err) && !c.draining.Load() {
			return fmt.Errorf("%w in the handshake", ErrTimeout)
		}
		return err
	}
	if err := c.raw.SetDeadline(time.Time{}); err != nil {
		return err
	}
	if c.draining.Load() { // and whose deadline we just moved
		return errBye
	}
	return nil
}

func (c *session) haggle() error {
	p := be.AppendUint64(nil, magicServer)
	p = be.AppendUint64(p, magicOption)
	p = be.AppendUint16(p, flagFixedNewstyle|flagNoZeroes)
	if _, err := c.nc.Write(p); err != nil {
		return err
	}
	var f [4]byte
	if _, err := io.ReadFull(c.br, f[:]); err != nil {
		return err
	}
	flags := be.Uint32(f[:])
	if flags&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return violation("client flags", "", flags, "fixed newstyle and no zeroes at most")
	}
	c.fixed, c.noZeroes = flags&flagFixedNewstyle != 0, flags&flagNoZeroes != 0
	for range maxOptions {
		done, err := c.option()
		if done || err != nil {
			return err
		}
	}
	return violation("handshake", "options", maxOptions, "fewer")
}

// option takes one option. done tells that transmission begins.
func (c *session) option() (done bool, err error) {
	var h [optionLen]byte
	if _, err := io.ReadFull(c.br, h[:]); err != nil {
		return false, err
	}
	if m := be.Uint64(h[:]); m != magicOption {
		return false, violation("option", "magic", m, "IHAVEOPT")
	}
	opt, n := be.Uint32(h[8:]), be.Uint32(h[12:])
	if n > maxPayload {
		return false, violation("option", "length", n, "at most 32 MiB")
	}
	if n > maxOptionData {
		if _, err := io.CopyN(io.Discard, c.br, int64(n)); err != nil {
			return false, err
		}
		if opt == optExportName {
			return false, violation("option", "length", n, "a name of at most 4096 bytes")
		}
		return false, c.refuse(opt, repTooBig, "the option is too long")
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(c.br, data); err != nil {
		return false, err
	}
	if c.server.secure() != nil && !c.tls && opt != optStartTLS && opt != optAbort {
		if opt == optExportName {
			return false, fmt.Errorf("%w: the client went on without", ErrTLSRequired)
		}
		return false, c.refuse(opt, repTLSRequired, "this server wants TLS")
	}
	return c.dispatch(opt, data)
}

func (c *session) dispatch(opt uint32, data []byte) (done bool, err error) {
	if !c.fixed && opt != optExportName {
		return false, violation("option", "option", opt, "EXPORT_NAME: the client isn't of the fixed newstyle")
	}
	switch opt {
	case optExportName:
		return true, c.exportName(string(data))
	case optAbort:
		_ = c.answer(opt, repAck, nil)
		return false, errBye
	case optList:
		return false, c.listExports(data)
	case optStartTLS:
		return false, c.startTLS(data)
	case optInfo, optGo:
		return c.infoOrGo(opt, data)
	case optStructuredReply:
		if len(data) > 0 {
			return false, c.refuse(opt, repInvalid, "STRUCTURED_REPLY takes no data")
		}
		c.structured = true
		return false, c.answer(opt, repAck, nil)
	case optListMeta, optSetMeta:
		return false, c.metaContexts(opt, data)
	}
	return false, c.refuse(opt, repUnsup, "")
}

// answer sends one reply to an option.
func (c *session) answer(opt, typ uint32, data []byte) error {
	p := be.AppendUint64(make([]byte, 0, optReplyLen+len(data)), magicOptReply)
	p = be.AppendUint32(p, opt)
	p = be.AppendUint32(p, typ)
	p = be.AppendUint32(p, uint32(len(data)))
	_, err := c.nc.Write(append(p, data...))
	return err
}

func (c *session) refuse(opt, code uint32, why string) error { return c.answer(opt, code, []byte(why)) }

func (c *session) startTLS(data []byte) error {
	secure := c.server.secure()
	switch {
	case len(data) > 0:
		return c.refuse(optStartTLS, repInvalid, "STARTTLS takes no data")
	case c.tls:
		return c.refuse(optStartTLS, repInvalid, "TLS is on already")
	case secure == nil:
		return c.refuse(optStartTLS, repPolicy, "this server has no TLS")
	}
	if c.br.Buffered() > 0 {
		// Sent in plain, to be taken for something that came by TLS.
		return violation("option", "STARTTLS", nil, "nothing behind it before the acknowledgement")
	}
	if err := c.answer(optStartTLS, repAck, nil); err != nil {
		return err
	}
	tc := secure(c.nc)
	if err := tc.Handshake(); err != nil {
		return fmt.Errorf("nbd: TLS: %w", err)
	}
	c.nc, c.br, c.tls = tc, bufio.NewReaderSize(tc, serverBuffer), true
	// Whatever was said before, anybody may have said.
	c.structured, c.meta, c.hasMeta = false, "", false
	return nil
}

func (c *session) listExports(data []byte) error {
	if len(data) > 0 {
		return c.refuse(optList, repInvalid, "LIST takes no data")
	}
	for _, x := range c.server.list() {
		p := be.AppendUint32(nil, uint32(len(x.Name)))
		p = append(p, x.Name...)
		if err := c.answer(optList, repServer, append(p, x.Description...)); err != nil {
			return err
		}
	}
	return c.answer(optList, repAck, nil)
}

func (c *session) exportName(name string) error {
	x := c.server.find(name)
	if x == nil {
		return fmt.Errorf("%w: no export %.64q", ErrRefused, name)
	}
	if x.MinBlock > 1 || x.MaxPayload < maxPayload {
		return fmt.Errorf("%w: export %.64q has block sizes, and the client can't be told", ErrRefused, name)
	}
	p := be.AppendUint64(nil, uint64(x.size))
	p = be.AppendUint16(p, c.flags(x))
	if !c.noZeroes {
		p = append(p, make([]byte, 124)...)
	}
	if _, err := c.nc.Write(p); err != nil {
		return err
	}
	return c.choose(x)
}

// choose settles the export, unless it was removed meanwhile.
func (c *session) choose(x *export) error {
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	if c.server.exports[x.Name] != x {
		return fmt.Errorf("%w: export %.64q was removed", ErrRefused, x.Name)
	}
	c.export = x
	return nil
}

// flags are the transmission flags of an export.
func (c *session) flags(x *export) uint16 {
	// A Sync of the Device is one for all connections, and all see the
	// same content, so multiple connections are always true.
	f := uint16(flagHasFlags | flagFlush | flagFUA | flagMultiConn | flagCache)
	if x.ReadOnly {
		f |= flagReadOnly
	} else {
		f |= flagTrim | flagWriteZeroes | flagFastZero
	}
	if c.structured {
		f |= flagDF
	}
	return f
}

// infoOrGo answers INFO and GO.
func (c *session) infoOrGo(opt uint32, data []byte) (done bool, err error) {
	name, wants, ok := parseInfo(data)
	if !ok {
		return false, c.refuse(opt, repInvalid, "a name of at most 4096 bytes, and a list of informations")
	}
	x := c.server.find(name)
	if x == nil {
		return false, c.refuse(opt, repUnknown, "no such export")
	}
	if !wants[infoBlockSize] && (x.MinBlock > 1 || x.MaxPayload < maxPayload) {
		return false, c.refuse(opt, repBlockSizeReqd, "this export has block sizes")
	}
	p := be.AppendUint16(nil, infoExport)
	p = be.AppendUint64(p, uint64(x.size))
	if err := c.answer(opt, repInfo, be.AppendUint16(p, c.flags(x))); err != nil {
		return false, err
	}
	p = be.AppendUint16(nil, infoBlockSize)
	p = be.AppendUint32(p, uint32(x.MinBlock))
	p = be.AppendUint32(p, uint32(x.PreferredBlock))
	if err := c.answer(opt, repInfo, be.AppendUint32(p, uint32(x.MaxPayload))); err != nil {
		return false, err
	}
	if wants[infoName] {
		if err := c.answer(opt, repInfo, append(be.AppendUint16(nil, infoName), x.Name...)); err != nil {
			return false, err
		}
	}
	if wants[infoDescription] && x.Description != "" {
		if err := c.answer(opt, repInfo, append(be.AppendUint16(nil, infoDescription), x.Description...)); err != nil {
			return false, err
		}
	}
	if opt == optGo {
		if err := c.choose(x); err != nil {
			return false, errors.Join(err, c.refuse(opt, repUnknown, "no such export"))
		}
	}
	return opt == optGo, c.answer(opt, repAck, nil)
}

// parseInfo takes the data of INFO or GO apart.
func parseInfo(data []byte) (name string, wants [4]bool, ok bool) {
	if len(data) < 6 {
		return "", wants, false
	}
	n := be.Uint32(data)
	if n > maxString || int(n) > len(data)-6 {
		return "", wants, false
	}
	name, data = string(data[4:4+n]), data[4+n:]
	k := int(be.Uint16(data))
	if data = data[2:]; len(data) != 2*k {
		return "", wants, false
	}
	for ; len(data) > 0; data = data[2:] {
		if w := be.Uint16(data); int(w) < len(wants) {
			wants[w] = true
		}
	}
	return name, wants, true
}

// contextID is what base:allocation is called in transmission.
const contextID = 1

func (c *session) metaContexts(opt uint32, data []byte) error {
	if opt == optSetMeta {
		c.hasMeta, c.meta = false, ""
	}
	if !c.structured {
		return c.refuse(opt, repInvalid, "STRUCTURED_REPLY comes first")
	}
	name, queries, ok := parseMeta(data)
	if !ok {
		return c.refuse(opt, repInvalid, "a name, and queries of at most 4096 bytes each")
	}
	x := c.server.find(name)
	if x == nil {
		return c.refuse(opt, repUnknown, "no such export")
	}
	found := opt == optListMeta && len(queries) == 0
	for _, q := range queries {
		found = found || q == contextAlloc || opt == optListMeta && q == "base:"
	}
	if found {
		id := uint32(0)
		if opt == optSetMeta {
			id, c.hasMeta, c.meta = contextID, true, x.Name
		}
		if err := c.answer(opt, repMeta, append(be.AppendUint32(nil, id), contextAlloc...)); err != nil {
			return err
		}
	}
	return c.answer(opt, repAck, nil)
}

// parseMeta takes the data of the meta context options apart.
func parseMeta(data []byte) (name string, queries []string, ok bool) {
	next := func() (string, bool) {
		if len(data) < 4 {
			return "", false
		}
		n := be.Uint32(data)
		if n > maxString || int(n) > len(data)-4 {
			return "", false
		}
		s := string(data[4 : 4+n])
		data = data[4+n:]
		return s, true
	}
	if name, ok = next(); !ok || len(data) < 4 {
		return "", nil, false
	}
	k := be.Uint32(data)
	data = data[4:]
	if int64(k)*4 > int64(len(data)) {
		return "", nil, false
	}
	for range k {
		q, ok := next()
		if !ok {
			return "", nil, false
		}
		queries = append(queries, q)
	}
	return name, queries, len(data) == 0
}
