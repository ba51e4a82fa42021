package tlspsk

import (
	"crypto/ecdh"
	"slices"

	"golang.org/x/crypto/cryptobyte"
)

// Types of handshake messages (RFC 8446, section 4).
const (
	typeClientHello         = 1
	typeServerHello         = 2
	typeNewSessionTicket    = 4
	typeEncryptedExtensions = 8
	typeFinished            = 20
	typeKeyUpdate           = 24
	typeMessageHash         = 254
)

// Extensions (section 4.2).
const (
	extSupportedGroups = 10
	extPreSharedKey    = 41
	extEarlyData       = 42
	extVersions        = 43
	extCookie          = 44
	extPSKModes        = 45
	extKeyShare        = 51
)

const (
	legacyVersion = 0x0303
	version13     = 0x0304
	modeDHE       = 1 // psk_dhe_ke (section 4.2.9)
	groupP256     = 0x0017
	groupX25519   = 0x001d
)

// groups are those that we know, in the order of preference.
var groups = []uint16{groupX25519, groupP256}

// curve returns a group's curve, or nil.
func curve(group uint16) ecdh.Curve {
	switch group {
	case groupX25519:
		return ecdh.X25519()
	case groupP256:
		return ecdh.P256()
	}
	return nil
}

// retryRandom is the random of a ServerHello that is a HelloRetryRequest
// (section 4.1.3).
const retryRandom = "\xcf\x21\xad\x74\xe5\x9a\x61\x11\xbe\x1d\x8c\x02\x1e\x65\xb8\x91" +
	"\xc2\xa2\x11\x16\x7a\xbb\x8c\x5e\x07\x9e\x09\xe2\xc8\xa8\x33\x9c"

type keyShare struct {
	group uint16
	data  []byte
}

// A clientHello is what counts of a ClientHello (section 4.1.2).
type clientHello struct {
	random, sessionID []byte
	suites            []uint16
	versions, groups  []uint16
	shares            []keyShare
	cookie, modes     []byte
	identities        [][]byte
	binders           [][]byte
	earlyData         bool

	seen map[uint16]bool // extensions
	head int             // bytes of the message before its binders
}

// marshal returns the message. Binders come last, so that they can be put in
// when the rest is known.
func (h *clientHello) marshal() []byte {
	b := cryptobyte.NewBuilder(nil)
	b.AddUint8(typeClientHello)
	b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) {
		b.AddUint16(legacyVersion)
		b.AddBytes(h.random)
		vector8(b, h.sessionID)
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { numbers(b, h.suites) })
		vector8(b, []byte{0}) // no compression
		b.AddUint16LengthPrefixed(h.extensions)
	})
	return b.BytesOrPanic()
}

func (h *clientHello) extensions(b *cryptobyte.Builder) {
	extension(b, extVersions, func(b *cryptobyte.Builder) {
		b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { numbers(b, h.versions) })
	})
	extension(b, extSupportedGroups, func(b *cryptobyte.Builder) {
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { numbers(b, h.groups) })
	})
	extension(b, extKeyShare, func(b *cryptobyte.Builder) {
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
			for _, s := range h.shares {
				b.AddUint16(s.group)
				vector16(b, s.data)
			}
		})
	})
	if len(h.cookie) > 0 {
		extension(b, extCookie, func(b *cryptobyte.Builder) { vector16(b, h.cookie) })
	}
	extension(b, extPSKModes, func(b *cryptobyte.Builder) { vector8(b, h.modes) })
	extension(b, extPreSharedKey, func(b *cryptobyte.Builder) { // the last: section 4.2.11
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
			for _, id := range h.identities {
				vector16(b, id)
				b.AddUint32(0) // the age of an external key
			}
		})
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
			for _, binder := range h.binders {
				vector8(b, binder)
			}
		})
	})
}

func extension(b *cryptobyte.Builder, typ uint16, body func(*cryptobyte.Builder)) {
	b.AddUint16(typ)
	b.AddUint16LengthPrefixed(body)
}

func vector8(b *cryptobyte.Builder, p []byte) {
	b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(p) })
}

func vector16(b *cryptobyte.Builder, p []byte) {
	b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(p) })
}

func numbers(b *cryptobyte.Builder, list []uint16) {
	for _, n := range list {
		b.AddUint16(n)
	}
}

// malformed is the fault of a message that doesn't parse.
func malformed(what string) error { return fault(decodeError, "a malformed "+what) }

// parseClientHello takes a message apart. What it returns lies in msg.
func parseClientHello(msg []byte) (*clientHello, error) {
	h := &clientHello{seen: map[uint16]bool{}}
	s := cryptobyte.String(msg[4:])
	var version uint16
	var suites, compression, exts cryptobyte.String
	if !s.ReadUint16(&version) || !s.ReadBytes(&h.random, 32) || !readVector8(&s, &h.sessionID) || len(h.sessionID) > 32 ||
		!s.ReadUint16LengthPrefixed(&suites) || !readNumbers(suites, &h.suites) ||
		!s.ReadUint8LengthPrefixed(&compression) || len(compression) == 0 {
		return nil, malformed("ClientHello")
	}
	if s.Empty() {
		return nil, fault(protocolVersion, "the client has no TLS 1.3")
	}
	if !s.ReadUint16LengthPrefixed(&exts) || !s.Empty() {
		return nil, malformed("ClientHello")
	}
	for !exts.Empty() {
		var typ uint16
		var body cryptobyte.String
		if !exts.ReadUint16(&typ) || !exts.ReadUint16LengthPrefixed(&body) {
			return nil, malformed("ClientHello")
		}
		if h.seen[typ] || h.seen[extPreSharedKey] {
			return nil, fault(illegalParameter, "an extension twice, or after pre_shared_key")
		}
		h.seen[typ] = true
		if !h.take(typ, body, len(msg)) {
			return nil, malformed("extension of the ClientHello")
		}
	}
	switch {
	case !slices.Contains(h.versions, version13):
		return nil, fault(protocolVersion, "the client has no TLS 1.3")
	case version != legacyVersion || len(compression) != 1 || compression[0] != 0:
		return nil, fault(illegalParameter, "a ClientHello of TLS 1.3 with another version, or compression")
	}
	return h, nil
}

// take reads one extension. Those that nobody knows are none of our business.
func (h *clientHello) take(typ uint16, body cryptobyte.String, end int) bool {
	var list cryptobyte.String
	switch typ {
	case extVersions:
		return body.ReadUint8LengthPrefixed(&list) && readNumbers(list, &h.versions) && body.Empty()
	case extSupportedGroups:
		return body.ReadUint16LengthPrefixed(&list) && readNumbers(list, &h.groups) && body.Empty()
	case extKeyShare:
		if !body.ReadUint16LengthPrefixed(&list) || !body.Empty() {
			return false
		}
		for !list.Empty() {
			var s keyShare
			if !list.ReadUint16(&s.group) || !readVector16(&list, &s.data) || len(s.data) == 0 {
				return false
			}
			h.shares = append(h.shares, s)
		}
		return true
	case extCookie:
		return readVector16(&body, &h.cookie) && len(h.cookie) > 0 && body.Empty()
	case extPSKModes:
		return readVector8(&body, &h.modes) && len(h.modes) > 0 && body.Empty()
	case extEarlyData:
		h.earlyData = true
		return body.Empty()
	case extPreSharedKey:
		return h.takeKeys(body, end)
	}
	return true
}

// takeKeys reads pre_shared_key (section 4.2.11), at whose end the message
// ends, which is end bytes long.
func (h *clientHello) takeKeys(body cryptobyte.String, end int) bool {
	var identities, binders cryptobyte.String
	if !body.ReadUint16LengthPrefixed(&identities) {
		return false
	}
	h.head = end - len(body)
	if !body.ReadUint16LengthPrefixed(&binders) || !body.Empty() {
		return false
	}
	for !identities.Empty() {
		var id []byte
		var age uint32
		if !readVector16(&identities, &id) || len(id) == 0 || !identities.ReadUint32(&age) {
			return false
		}
		h.identities = append(h.identities, id)
	}
	for !binders.Empty() {
		var b []byte
		if !readVector8(&binders, &b) || len(b) < 32 {
			return false
		}
		h.binders = append(h.binders, b)
	}
	return len(h.identities) > 0 && len(h.identities) == len(h.binders)
}

func readVector8(s *cryptobyte.String, p *[]byte) bool {
	return s.ReadUint8LengthPrefixed((*cryptobyte.String)(p))
}

func readVector16(s *cryptobyte.String, p *[]byte) bool {
	return s.ReadUint16LengthPrefixed((*cryptobyte.String)(p))
}

// readNumbers reads a list of at least one.
func readNumbers(s cryptobyte.String, list *[]uint16) bool {
	if s.Empty() {
		return false
	}
	for !s.Empty() {
		var n uint16
		if !s.ReadUint16(&n) {
			return false
		}
		*list = append(*list, n)
	}
	return true
}

// A serverHello is a ServerHello or a HelloRetryRequest (sections 4.1.3 and
// 4.1.4).
type serverHello struct {
	random, sessionID []byte
	suite             uint16
	version           uint16
	share             keyShare // of a HelloRetryRequest: the group alone
	cookie            []byte
	index             uint16 // of the key

	seen map[uint16]bool // extensions
}

func (h *serverHello) retry() bool { return string(h.random) == retryRandom }

func (h *serverHello) marshal() []byte {
	b := cryptobyte.NewBuilder(nil)
	b.AddUint8(typeServerHello)
	b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) {
		b.AddUint16(legacyVersion)
		b.AddBytes(h.random)
		vector8(b, h.sessionID)
		b.AddUint16(h.suite)
		b.AddUint8(0) // no compression
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
			extension(b, extVersions, func(b *cryptobyte.Builder) { b.AddUint16(version13) })
			extension(b, extKeyShare, func(b *cryptobyte.Builder) {
				b.AddUint16(h.share.group)
				if !h.retry() {
					vector16(b, h.share.data)
				}
			})
			if len(h.cookie) > 0 {
				extension(b, extCookie, func(b *cryptobyte.Builder) { vector16(b, h.cookie) })
			}
			if !h.retry() {
				extension(b, extPreSharedKey, func(b *cryptobyte.Builder) { b.AddUint16(h.index) })
			}
		})
	})
	return b.BytesOrPanic()
}

// parseServerHello takes a message apart, and refuses what only earlier
// versions say. What it returns lies in msg.
func parseServerHello(msg []byte) (*serverHello, error) {
	h := &serverHello{seen: map[uint16]bool{}}
	s := cryptobyte.String(msg[4:])
	var version uint16
	var compression uint8
	var exts cryptobyte.String
	if !s.ReadUint16(&version) || !s.ReadBytes(&h.random, 32) || !readVector8(&s, &h.sessionID) || len(h.sessionID) > 32 ||
		!s.ReadUint16(&h.suite) || !s.ReadUint8(&compression) {
		return nil, malformed("ServerHello")
	}
	if s.Empty() {
		return nil, fault(protocolVersion, "the server has no TLS 1.3")
	}
	if !s.ReadUint16LengthPrefixed(&exts) || !s.Empty() {
		return nil, malformed("ServerHello")
	}
	for !exts.Empty() {
		var typ uint16
		var body cryptobyte.String
		if !exts.ReadUint16(&typ) || !exts.ReadUint16LengthPrefixed(&body) {
			return nil, malformed("ServerHello")
		}
		if h.seen[typ] {
			return nil, fault(illegalParameter, "an extension twice")
		}
		h.seen[typ] = true
		if !h.take(typ, body) {
			return nil, malformed("extension of the ServerHello")
		}
	}
	switch {
	case !h.seen[extVersions]:
		return nil, fault(protocolVersion, "the server has no TLS 1.3")
	case h.version != version13 || version != legacyVersion || compression != 0:
		return nil, fault(illegalParameter, "a ServerHello of another version, or with compression")
	}
	for typ := range h.seen {
		if typ != extVersions && typ != extKeyShare && typ != extCookie && typ != extPreSharedKey ||
			h.retry() && typ == extPreSharedKey || !h.retry() && typ == extCookie {
			return nil, fault(unsupportedExtension, "an extension that wasn't asked for, in the ServerHello")
		}
	}
	return h, nil
}

func (h *serverHello) take(typ uint16, body cryptobyte.String) bool {
	switch typ {
	case extVersions:
		return body.ReadUint16(&h.version) && body.Empty()
	case extKeyShare:
		if !body.ReadUint16(&h.share.group) {
			return false
		}
		return (h.retry() || readVector16(&body, &h.share.data) && len(h.share.data) > 0) && body.Empty()
	case extCookie:
		return readVector16(&body, &h.cookie) && len(h.cookie) > 0 && body.Empty()
	case extPreSharedKey:
		return body.ReadUint16(&h.index) && body.Empty()
	}
	return true
}

// checkEncryptedExtensions refuses what a client that offers as little as ours
// can't be told (section 4.3.1).
func checkEncryptedExtensions(msg []byte) error {
	s := cryptobyte.String(msg[4:])
	var exts cryptobyte.String
	if !s.ReadUint16LengthPrefixed(&exts) || !s.Empty() {
		return malformed("EncryptedExtensions")
	}
	seen := false
	for !exts.Empty() {
		var typ uint16
		var body cryptobyte.String
		if !exts.ReadUint16(&typ) || !exts.ReadUint16LengthPrefixed(&body) {
			return malformed("EncryptedExtensions")
		}
		if typ != extSupportedGroups {
			return fault(unsupportedExtension, "an extension that wasn't asked for, in EncryptedExtensions")
		}
		var list cryptobyte.String
		if seen || !body.ReadUint16LengthPrefixed(&list) || !readNumbers(list, new([]uint16)) || !body.Empty() {
			return malformed("extension in EncryptedExtensions")
		}
		seen = true
	}
	return nil
}
