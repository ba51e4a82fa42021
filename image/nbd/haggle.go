package nbd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"nvstore.dev/image"
)

// Info is what a server says of an export.
type Info struct {
	Export      string `json:"export"` // the server's name for it
	Description string `json:"description,omitempty"`
	Size        int64  `json:"size"` // bytes
	ReadOnly    bool   `json:"read_only"`

	Flush       bool `json:"flush"`
	FUA         bool `json:"fua"`
	Trim        bool `json:"trim"`
	WriteZeroes bool `json:"write_zeroes"`
	FastZero    bool `json:"fast_zero"`
	Cache       bool `json:"cache"`
	MultiConn   bool `json:"multi_conn"`
	Rotational  bool `json:"rotational"`

	DontFragment bool `json:"dont_fragment"` // a read's reply in one piece

	Structured bool `json:"structured_replies"`
	Allocation bool `json:"base_allocation"` // block status
	TLS        bool `json:"tls"`

	MinBlock       int64 `json:"min_block"`       // bytes; requests are multiples of it
	PreferredBlock int64 `json:"preferred_block"` // bytes
	MaxPayload     int64 `json:"max_payload"`     // bytes of one read or write
}

// setFlags takes the transmission flags apart.
func (i *Info) setFlags(f uint16) {
	i.ReadOnly = f&flagReadOnly != 0
	i.Flush = f&flagFlush != 0
	i.FUA = f&flagFUA != 0
	i.DontFragment = f&flagDF != 0
	i.Rotational = f&flagRotational != 0
	i.Trim = f&flagTrim != 0
	i.WriteZeroes = f&flagWriteZeroes != 0
	i.FastZero = f&flagFastZero != 0 && i.WriteZeroes
	i.Cache = f&flagCache != 0
	i.MultiConn = f&flagMultiConn != 0
}

// A haggler is a client's connection before transmission.
type haggler struct {
	nc       net.Conn
	raw      net.Conn // below TLS
	br       *bufio.Reader
	fixed    bool // fixed newstyle: options can be refused
	noZeroes bool
	info     Info
	allocID  uint32 // of base:allocation, if info.Allocation
}

// bufferSize holds a few dozen small replies, or requests, so that a busy
// connection is read with few system calls.
const bufferSize = 32 << 10

// greet dials and does what comes before the options, TLS included.
func greet(ctx context.Context, t *Target, o *Options) (*haggler, error) {
	ctx, cancel := context.WithTimeout(ctx, o.HandshakeTimeout)
	defer cancel()
	nc, err := o.dial(ctx, t)
	if err != nil {
		return nil, err
	}
	h := &haggler{nc: nc, raw: nc, br: bufio.NewReaderSize(nc, bufferSize)}
	if err := h.within(ctx, func() error { return h.start(t, o) }); err != nil {
		nc.Close()
		return nil, err
	}
	return h, nil
}

// within runs fn, which talks to the server, under ctx's deadline.
func (h *haggler) within(ctx context.Context, fn func() error) error {
	deadline, _ := ctx.Deadline()
	if err := h.nc.SetDeadline(deadline); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = h.raw.SetDeadline(time.Unix(1, 0)) })
	err := fn()
	if !stop() && err == nil {
		err = context.Cause(ctx) // the deadline may have been moved already
	}
	if err != nil {
		if ctx.Err() == context.Canceled {
			return context.Cause(ctx)
		}
		if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() || ctx.Err() != nil {
			return fmt.Errorf("%w in the handshake", ErrTimeout)
		}
		return hungUp(err, "in the handshake")
	}
	return h.nc.SetDeadline(time.Time{})
}

// hungUp turns an end of the stream into words.
func hungUp(err error, when string) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("%w: the server hung up %s", ErrDisconnected, when)
	}
	return err
}

func (h *haggler) start(t *Target, o *Options) error {
	var p [18]byte
	if _, err := io.ReadFull(h.br, p[:16]); err != nil {
		return err
	}
	if m := be.Uint64(p[:]); m != magicServer {
		return violation("handshake", "magic", m, "NBDMAGIC: this is no NBD server")
	}
	switch m := be.Uint64(p[8:]); m {
	case magicOption:
	case magicOldstyle:
		return fmt.Errorf("nbd: the server speaks the oldstyle handshake: %w", image.ErrUnsupported)
	default:
		return violation("handshake", "magic", m, "IHAVEOPT")
	}
	if _, err := io.ReadFull(h.br, p[16:]); err != nil {
		return err
	}
	flags := be.Uint16(p[16:])
	h.fixed = flags&flagFixedNewstyle != 0
	h.noZeroes = flags&flagNoZeroes != 0
	if _, err := h.nc.Write(be.AppendUint32(nil, uint32(flags&(flagFixedNewstyle|flagNoZeroes)))); err != nil {
		return err
	}
	secure, err := o.secure(t)
	if err != nil || secure == nil {
		return err
	}
	if !h.fixed {
		return fmt.Errorf("%w: the server is too old for it", ErrTLSRequired)
	}
	return h.startTLS(secure)
}

func (h *haggler) startTLS(secure func(net.Conn) tlsConn) error {
	err := h.option(optStartTLS, nil, nil)
	if refused := (*refusal)(nil); errors.As(err, &refused) {
		return fmt.Errorf("%w: %w", ErrTLSRequired, err)
	}
	if err != nil {
		return err
	}
	if h.br.Buffered() > 0 {
		// Whoever sits between could have put it there.
		return violation("handshake", "STARTTLS", nil, "nothing in plain after the acknowledgement")
	}
	tc := secure(h.nc)
	if err := tc.Handshake(); err != nil {
		return tlsFailed(tc, err)
	}
	h.nc, h.br = tc, bufio.NewReaderSize(tc, bufferSize)
	h.info.TLS = true
	return nil
}

// enter chooses the export and begins transmission.
func (h *haggler) enter(export string) error {
	h.info.Export = export
	h.info.MinBlock, h.info.PreferredBlock, h.info.MaxPayload = 1, 4096, maxPayload
	if !h.fixed {
		return h.exportName(export)
	}
	if err := h.features(export); err != nil {
		return err
	}
	err := h.infoOption(optGo, export)
	if refused := (*refusal)(nil); errors.As(err, &refused) && refused.code == repUnsup {
		return h.exportName(export)
	}
	return err
}

// features asks for what changes transmission. A server may refuse them.
func (h *haggler) features(export string) error {
	ok, err := h.optional(optStructuredReply, nil, nil)
	if !ok {
		return err
	}
	h.info.Structured = true
	found := false
	_, err = h.optional(optSetMeta, metaQuery(export, contextAlloc), func(typ uint32, p []byte) error {
		if typ != repMeta || len(p) < 4 || string(p[4:]) != contextAlloc || found {
			return violation("option reply", "meta context", typ, "base:allocation once, as asked for")
		}
		h.allocID, found = be.Uint32(p), true
		return nil
	})
	h.info.Allocation = found && err == nil
	return err
}

// optional is option for what a server may refuse.
func (h *haggler) optional(opt uint32, data []byte, each func(uint32, []byte) error) (bool, error) {
	err := h.option(opt, data, each)
	if refused := (*refusal)(nil); errors.As(err, &refused) {
		switch refused.code {
		case repTLSRequired, repShutdown:
			return false, err
		}
		return false, nil
	}
	return err == nil, err
}

func metaQuery(export, query string) []byte {
	p := be.AppendUint32(nil, uint32(len(export)))
	p = append(p, export...)
	p = be.AppendUint32(p, 1)
	p = be.AppendUint32(p, uint32(len(query)))
	return append(p, query...)
}

// infoOption sends INFO or GO.
func (h *haggler) infoOption(opt uint32, export string) error {
	wanted := []uint16{infoExport, infoName, infoDescription, infoBlockSize}
	p := be.AppendUint32(nil, uint32(len(export)))
	p = append(p, export...)
	p = be.AppendUint16(p, uint16(len(wanted)))
	for _, w := range wanted {
		p = be.AppendUint16(p, w)
	}
	known := false
	err := h.option(opt, p, func(typ uint32, p []byte) error {
		if typ != repInfo || len(p) < 2 {
			return violation("option reply", "type", typ, "INFO of two bytes or more")
		}
		what, p := be.Uint16(p), p[2:]
		if what == infoExport {
			known = true
		}
		return h.takeInfo(what, p)
	})
	if err == nil && !known {
		return violation("option reply", "INFO", nil, "the size and flags before the acknowledgement")
	}
	return err
}

func (h *haggler) takeInfo(what uint16, p []byte) error {
	switch what {
	case infoExport:
		if len(p) != 10 {
			return violation("INFO", "length", len(p), "10 bytes of size and flags")
		}
		return h.takeExport(be.Uint64(p), be.Uint16(p[8:]))
	case infoName:
		h.info.Export = clip(p)
	case infoDescription:
		h.info.Description = clip(p)
	case infoBlockSize:
		if len(p) != 12 {
			return violation("INFO", "length", len(p), "12 bytes of block sizes")
		}
		lo, pref, hi := int64(be.Uint32(p)), int64(be.Uint32(p[4:])), int64(be.Uint32(p[8:]))
		switch {
		case lo < 1 || lo > maxMinBlock || lo&(lo-1) != 0:
			return violation("INFO", "minimum block size", lo, "a power of 2, at most 65536")
		case pref < lo || pref < 512 || pref&(pref-1) != 0:
			return violation("INFO", "preferred block size", pref, "a power of 2, at least 512 and the minimum")
		case hi < pref:
			return violation("INFO", "maximum payload", hi, "at least the preferred block size")
		}
		h.info.MinBlock, h.info.PreferredBlock = lo, pref
		h.info.MaxPayload = min(hi, maxPayload) &^ (lo - 1)
	}
	return nil
}

func (h *haggler) takeExport(size uint64, flags uint16) error {
	if size > 1<<63-1 {
		return violation("export", "size", size, "less than 2⁶³ bytes")
	}
	if flags&flagHasFlags == 0 {
		return violation("export", "flags", flags, "HAS_FLAGS")
	}
	h.info.Size = int64(size)
	h.info.setFlags(flags)
	return nil
}

// exportName enters transmission as servers without GO have it. They hang up
// if they don't know the export.
func (h *haggler) exportName(export string) error {
	if err := h.sendOption(optExportName, []byte(export)); err != nil {
		return err
	}
	p := make([]byte, 10)
	if _, err := io.ReadFull(h.br, p); err != nil {
		if err == io.EOF {
			return fmt.Errorf("%w: no export %q, as far as an old server says so", ErrRefused, export)
		}
		return err
	}
	if !h.noZeroes {
		if _, err := io.CopyN(io.Discard, h.br, 124); err != nil {
			return err
		}
	}
	return h.takeExport(be.Uint64(p), be.Uint16(p[8:]))
}

func (h *haggler) sendOption(opt uint32, data []byte) error {
	p := be.AppendUint64(make([]byte, 0, optionLen+len(data)), magicOption)
	p = be.AppendUint32(p, opt)
	p = be.AppendUint32(p, uint32(len(data)))
	_, err := h.nc.Write(append(p, data...))
	return err
}

// A refusal is an option's error reply.
type refusal struct {
	opt, code uint32
	message   string
}

func (r *refusal) Error() string {
	s := fmt.Sprintf("nbd: %s: %s", optionName(r.opt), refusalName(r.code))
	if r.message != "" {
		s += fmt.Sprintf(" (%q)", r.message)
	}
	return s
}

func (r *refusal) Is(kind error) bool {
	switch r.code {
	case repTLSRequired:
		return kind == ErrTLSRequired
	case repUnknown:
		return kind == image.ErrNotFound
	case repUnsup, repPlatform:
		return kind == image.ErrUnsupported || kind == ErrRefused
	}
	return kind == ErrRefused
}

func optionName(opt uint32) string {
	names := []string{"", "EXPORT_NAME", "ABORT", "LIST", "", "STARTTLS", "INFO", "GO", "STRUCTURED_REPLY", "LIST_META_CONTEXT", "SET_META_CONTEXT"}
	if int(opt) < len(names) {
		return names[opt]
	}
	return fmt.Sprintf("option %d", opt)
}

func refusalName(code uint32) string {
	names := []string{"", "not known to the server", "against the server's policy", "invalid", "not supported on its platform",
		"TLS is required", "no such export", "the server is shutting down", "block sizes must be asked for", "too big"}
	if i := code &^ repError; i > 0 && int(i) < len(names) {
		return names[i]
	}
	return fmt.Sprintf("error %#x", code)
}

// option sends an option and reads its replies up to the last. each sees those
// before it.
func (h *haggler) option(opt uint32, data []byte, each func(typ uint32, p []byte) error) error {
	if err := h.sendOption(opt, data); err != nil {
		return err
	}
	total := 0
	for range maxReplies {
		typ, p, err := h.reply(opt)
		if err != nil {
			return err
		}
		switch {
		case typ == repAck:
			if len(p) > 0 {
				return violation("option reply", "length", len(p), "0 in an acknowledgement")
			}
			return nil
		case typ&repError != 0:
			return &refusal{opt, typ, clip(p)}
		case each == nil:
			return violation("option reply", "type", typ, "an acknowledgement or an error")
		}
		if total += len(p); total > maxPayload {
			return violation("option reply", "length", total, "at most 32 MiB in all")
		}
		if err := each(typ, p); err != nil {
			return err
		}
	}
	return violation("option reply", "number", maxReplies, "fewer replies")
}

// maxOptReply bounds one reply: two strings, with what stands around them.
const maxOptReply = 2*maxString + 64

func (h *haggler) reply(opt uint32) (typ uint32, data []byte, err error) {
	var p [optReplyLen]byte
	if _, err := io.ReadFull(h.br, p[:]); err != nil {
		return 0, nil, err
	}
	if m := be.Uint64(p[:]); m != magicOptReply {
		return 0, nil, violation("option reply", "magic", m, "0x3e889045565a9")
	}
	if got := be.Uint32(p[8:]); got != opt {
		return 0, nil, violation("option reply", "option", got, fmt.Sprintf("%d, which was sent", opt))
	}
	typ = be.Uint32(p[12:])
	n := be.Uint32(p[16:])
	if n > maxOptReply {
		return 0, nil, violation("option reply", "length", n, fmt.Sprintf("at most %d", maxOptReply))
	}
	data = make([]byte, n)
	_, err = io.ReadFull(h.br, data)
	return typ, data, err
}

// abort ends a handshake as the protocol asks. The server's answer is of no
// interest, and may never come.
func (h *haggler) abort() error {
	_ = h.nc.SetDeadline(time.Now().Add(time.Second))
	if h.fixed {
		_ = h.sendOption(optAbort, nil)
	}
	return h.nc.Close()
}
