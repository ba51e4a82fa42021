package tlspsk

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"slices"
	"sync"
)

// nobody is the key of all identities that there aren't. Nobody has it.
var nobody = sync.OnceValue(func() []byte {
	k := make([]byte, hashLen)
	rand.Read(k)
	return k
})

// serverHandshake is figure 1 of RFC 8446 from the server's side, with
// pre_shared_key and key_share.
func (c *Conn) serverHandshake() error {
	seen := newTranscript()
	hello, raw, err := c.clientHello()
	if err != nil {
		return err
	}
	c.ccs = true
	s, ok := hello.suite()
	if !ok {
		return fault(handshakeFailure, "no cipher suite in common")
	}
	share, ok := hello.share()
	if !ok {
		if hello, raw, err = c.retry(hello, raw, s, seen); err != nil {
			return err
		}
		share = hello.shares[0]
	}
	early, index, err := c.pick(hello, raw, seen)
	if err != nil {
		return err
	}
	seen.Write(raw)
	private, err := curve(share.group).GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	shared, err := exchange(private, share)
	if err != nil {
		return err
	}
	sh := &serverHello{random: make([]byte, 32), sessionID: hello.sessionID, suite: s.id, index: index,
		share: keyShare{share.group, private.PublicKey().Bytes()}}
	rand.Read(sh.random)
	c.sendServerHello(sh, seen, !ok)
	return c.serverFinish(s, early.next(shared), seen)
}

// clientHello reads a hello that has all that is needed.
func (c *Conn) clientHello() (*clientHello, []byte, error) {
	raw, err := c.message(typeClientHello)
	if err != nil {
		return nil, nil, err
	}
	if err := c.boundary(); err != nil {
		return nil, nil, err
	}
	h, err := parseClientHello(raw)
	if err != nil {
		return nil, nil, err
	}
	return h, raw, h.enough()
}

// enough refuses a hello without what is needed.
func (h *clientHello) enough() error {
	switch {
	case !h.seen[extPreSharedKey]:
		return fault(handshakeFailure, "the client offers no key")
	case !h.seen[extPSKModes] || !h.seen[extSupportedGroups] || !h.seen[extKeyShare]:
		return fault(missingExtension, "the client says too little (section 9.2)")
	case !bytes.Contains(h.modes, []byte{modeDHE}):
		return fault(handshakeFailure, "the client doesn't want (EC)DHE")
	case h.earlyData:
		// Who sends some was told of a limit that we don't have.
		return fault(handshakeFailure, "the client sends early data")
	}
	return nil
}

// suite chooses a cipher suite.
func (h *clientHello) suite() (suite, bool) {
	for _, s := range suites {
		if slices.Contains(h.suites, s.id) {
			return s, true
		}
	}
	return suite{}, false
}

// share chooses one of the client's shares.
func (h *clientHello) share() (keyShare, bool) {
	for _, g := range groups {
		for _, s := range h.shares {
			if s.group == g {
				return s, true
			}
		}
	}
	return keyShare{}, false
}

// retry asks for a share of a group that both ends know.
func (c *Conn) retry(hello *clientHello, raw []byte, s suite, seen transcript) (*clientHello, []byte, error) {
	i := slices.IndexFunc(groups, func(g uint16) bool { return slices.Contains(hello.groups, g) })
	if i < 0 {
		return nil, nil, fault(handshakeFailure, "no group in common")
	}
	seen.Write(raw)
	seen.retried()
	c.sendServerHello(&serverHello{random: []byte(retryRandom), sessionID: hello.sessionID, suite: s.id,
		share: keyShare{group: groups[i]}}, seen, false)
	if err := c.flush(); err != nil {
		return nil, nil, err
	}
	second, raw, err := c.clientHello()
	if err != nil {
		return nil, nil, err
	}
	if len(second.shares) != 1 || second.shares[0].group != groups[i] || !slices.Contains(second.suites, s.id) ||
		!bytes.Equal(second.random, hello.random) || !bytes.Equal(second.sessionID, hello.sessionID) {
		return nil, nil, fault(illegalParameter, "a second ClientHello that isn't the first with the share asked for")
	}
	return second, raw, nil
}

// pick chooses a key that the client offers, and verifies the binder of this
// one alone (section 4.2.11). An identity that there isn't ends as a binder
// that is wrong, so that nobody learns which there are (appendix E.6).
func (c *Conn) pick(h *clientHello, raw []byte, seen transcript) (early schedule, index uint16, err error) {
	key, at := nobody(), 0
	for i, id := range h.identities {
		if k, ok := c.keys[string(id)]; ok {
			key, at = k, i
			break
		}
	}
	early = earlySecret(key)
	if !hmac.Equal(h.binders[at], early.binder(seen.with(raw[:h.head]))) {
		return schedule{}, 0, fault(decryptError, "the client has no key of ours by the identity that it gives")
	}
	return early, uint16(at), nil
}

// sendServerHello seals the hello, and what middleboxes want to see after the
// first, if the client wants them to (appendix D.4).
func (c *Conn) sendServerHello(sh *serverHello, seen transcript, second bool) {
	msg := sh.marshal()
	seen.Write(msg)
	c.protect(typeHandshake, msg)
	if len(sh.sessionID) > 0 && !second {
		c.protect(typeChangeCipherSpec, []byte{1})
	}
}

// serverFinish is all after the ServerHello. Nothing is sent to a client that
// hasn't finished: a binder proves only that somebody had the key once.
func (c *Conn) serverFinish(s suite, handshake schedule, seen transcript) error {
	client, server := handshake.traffic("hs", seen.sum())
	c.in.use(s, client)
	c.out.use(s, server)
	extensions := []byte{typeEncryptedExtensions, 0, 0, 2, 0, 0}
	seen.Write(extensions)
	c.protect(typeHandshake, extensions)
	c.sendFinished(server, seen)
	if err := c.flush(); err != nil {
		return err
	}
	clientApp, serverApp := handshake.next(make([]byte, hashLen)).traffic("ap", seen.sum())
	c.out.use(s, serverApp)
	if err := c.takeFinished(client, seen); err != nil {
		return err
	}
	c.in.use(s, clientApp)
	c.ccs = false
	return nil
}
