package tlspsk

import (
	"crypto/ecdh"
	"crypto/hmac"
	"crypto/rand"
	"slices"
)

// A clientSide is what the client's end has.
type clientSide struct {
	identity string
	key      []byte
}

// clientHandshake is figure 1 of RFC 8446 from the client's side, with
// pre_shared_key and key_share.
func (c *Conn) clientHandshake() error {
	hello, private, err := c.client.hello()
	if err != nil {
		return err
	}
	early, seen := earlySecret(c.client.key), newTranscript()
	c.ccs = true
	if err := c.sendHello(hello, early, seen); err != nil {
		return err
	}
	sh, raw, err := c.serverHello(hello)
	if err != nil {
		return err
	}
	if sh.retry() {
		first := sh.suite
		if private, err = hello.again(sh, private); err != nil {
			return err
		}
		seen.retried()
		seen.Write(raw)
		if err := c.sendHello(hello, early, seen); err != nil {
			return err
		}
		if sh, raw, err = c.serverHello(hello); err != nil {
			return err
		}
		if sh.retry() || sh.suite != first {
			return fault(illegalParameter, "a second HelloRetryRequest, or another cipher suite after it")
		}
	}
	seen.Write(raw)
	s, _ := findSuite(sh.suite)
	if err := sh.agrees(hello); err != nil {
		return err
	}
	shared, err := exchange(private, sh.share)
	if err != nil {
		return err
	}
	return c.clientFinish(s, early.next(shared), seen)
}

// hello makes a ClientHello with one key and one share.
func (k *clientSide) hello() (*clientHello, *ecdh.PrivateKey, error) {
	h := &clientHello{random: make([]byte, 32), versions: []uint16{version13}, groups: groups, modes: []byte{modeDHE},
		identities: [][]byte{[]byte(k.identity)}, binders: [][]byte{make([]byte, hashLen)}}
	for _, s := range suites {
		h.suites = append(h.suites, s.id)
	}
	rand.Read(h.random)
	private, err := h.offer(groups[0])
	return h, private, err
}

// offer makes a share of a group the only one.
func (h *clientHello) offer(group uint16) (*ecdh.PrivateKey, error) {
	private, err := curve(group).GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	h.shares = []keyShare{{group, private.PublicKey().Bytes()}}
	return private, nil
}

// again changes the hello as a HelloRetryRequest asks for: another group, a
// cookie, or both.
func (h *clientHello) again(sh *serverHello, private *ecdh.PrivateKey) (*ecdh.PrivateKey, error) {
	h.cookie = sh.cookie
	switch {
	case sh.seen[extKeyShare] && slices.Contains(h.groups, sh.share.group) && sh.share.group != h.shares[0].group:
		return h.offer(sh.share.group)
	case !sh.seen[extKeyShare] && sh.seen[extCookie]:
		return private, nil
	}
	return nil, fault(illegalParameter, "a HelloRetryRequest that asks for nothing new, or for what wasn't offered")
}

// bound returns the message, with a binder over all before it.
func (h *clientHello) bound(early schedule, seen transcript) []byte {
	raw := h.marshal()
	head := len(raw) - 2 - 1 - hashLen // the list's length, the binder's, the binder
	copy(raw[head+3:], early.binder(seen.with(raw[:head])))
	return raw
}

func (c *Conn) sendHello(h *clientHello, early schedule, seen transcript) error {
	raw := h.bound(early, seen)
	seen.Write(raw)
	for part := range slices.Chunk(raw, maxPlain) { // a server's cookie may be long
		c.protect(typeHandshake, part)
	}
	return c.flush()
}

// serverHello reads the answer to a hello.
func (c *Conn) serverHello(hello *clientHello) (*serverHello, []byte, error) {
	raw, err := c.message(typeServerHello)
	if err != nil {
		return nil, nil, err
	}
	if err := c.boundary(); err != nil {
		return nil, nil, err
	}
	sh, err := parseServerHello(raw)
	if err != nil {
		return nil, nil, err
	}
	if !slices.Contains(hello.suites, sh.suite) || len(sh.sessionID) > 0 {
		return nil, nil, fault(illegalParameter, "a ServerHello with what wasn't offered")
	}
	return sh, raw, nil
}

// agrees tells whether a ServerHello takes what was offered.
func (sh *serverHello) agrees(h *clientHello) error {
	switch {
	case !sh.seen[extPreSharedKey]:
		return fault(handshakeFailure, "the server doesn't want the key")
	case !sh.seen[extKeyShare]:
		return fault(missingExtension, "the server goes on without (EC)DHE")
	case sh.index != 0 || sh.share.group != h.shares[0].group:
		return fault(illegalParameter, "a ServerHello with what wasn't offered")
	}
	return nil
}

// exchange is (EC)DHE with the peer's share (section 7.4.2).
func exchange(private *ecdh.PrivateKey, share keyShare) ([]byte, error) {
	public, err := curve(share.group).NewPublicKey(share.data)
	if err != nil {
		return nil, fault(illegalParameter, "a key share that is no point")
	}
	shared, err := private.ECDH(public)
	if err != nil {
		return nil, fault(illegalParameter, "a key share of low order")
	}
	return shared, nil
}

// clientFinish is all after the ServerHello.
func (c *Conn) clientFinish(s suite, handshake schedule, seen transcript) error {
	client, server := handshake.traffic("hs", seen.sum())
	c.in.use(s, server)
	c.out.use(s, client)
	msg, err := c.message(typeEncryptedExtensions)
	if err != nil {
		return err
	}
	if err := checkEncryptedExtensions(msg); err != nil {
		return err
	}
	seen.Write(msg)
	if err := c.takeFinished(server, seen); err != nil {
		return err
	}
	clientApp, serverApp := handshake.next(make([]byte, hashLen)).traffic("ap", seen.sum())
	c.sendFinished(client, seen)
	if err := c.flush(); err != nil {
		return err
	}
	c.in.use(s, serverApp)
	c.out.use(s, clientApp)
	c.ccs = false
	return nil
}

// takeFinished verifies the peer's Finished, and counts it.
func (c *Conn) takeFinished(secret []byte, seen transcript) error {
	msg, err := c.message(typeFinished)
	if err != nil {
		return err
	}
	if err := c.boundary(); err != nil {
		return err
	}
	if len(msg) != 4+hashLen {
		return malformed("Finished")
	}
	if !hmac.Equal(msg[4:], finishedMAC(secret, seen.sum())) {
		return fault(decryptError, "the Finished is wrong")
	}
	seen.Write(msg)
	return nil
}

// sendFinished seals a Finished, and counts it.
func (c *Conn) sendFinished(secret []byte, seen transcript) {
	msg := append([]byte{typeFinished, 0, 0, hashLen}, finishedMAC(secret, seen.sum())...)
	seen.Write(msg)
	c.protect(typeHandshake, msg)
}
