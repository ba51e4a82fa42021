package tlspsk

import (
	"bytes"
	"crypto/rand"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/cryptobyte"
)

// A piece is an extension on the wire.
type piece struct {
	typ  uint16
	body []byte
}

// edit changes the extensions of a hello that ends with them, which begin at
// off, and leaves the rest as it is.
func edit(t testing.TB, msg []byte, off int, change func([]piece) []piece) []byte {
	t.Helper()
	s, list := cryptobyte.String(msg[off+2:]), []piece(nil)
	for !s.Empty() {
		var p piece
		require.True(t, s.ReadUint16(&p.typ) && readVector16(&s, &p.body))
		list = append(list, p)
	}
	b := cryptobyte.NewBuilder(nil)
	b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
		for _, p := range change(list) {
			b.AddUint16(p.typ)
			vector16(b, p.body)
		}
	})
	return framed(msg[0], append(bytes.Clone(msg[4:off]), b.BytesOrPanic()...))
}

// framed is a handshake message.
func framed(typ byte, body []byte) []byte {
	b := cryptobyte.NewBuilder([]byte{typ})
	b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(body) })
	return b.BytesOrPanic()
}

func without(typ uint16) func([]piece) []piece {
	return func(list []piece) (kept []piece) {
		for _, p := range list {
			if p.typ != typ {
				kept = append(kept, p)
			}
		}
		return kept
	}
}

func with(typ uint16, body ...byte) func([]piece) []piece {
	return func(list []piece) []piece {
		list = append([]piece{}, list...)
		for i, p := range list {
			if p.typ == typ {
				list[i].body = body
				return list
			}
		}
		return append([]piece{{typ, body}}, list...)
	}
}

func twice(list []piece) []piece { return append([]piece{list[0]}, list...) }

// sends sends a message as it is.
func sends(t testing.TB, c *Conn, msg []byte) {
	t.Helper()
	for len(msg) > 0 {
		n := min(len(msg), maxPlain)
		c.protect(typeHandshake, msg[:n])
		msg = msg[n:]
	}
	require.NoError(t, c.flush())
}

// hears requires that the peer ends the connection by an alert, and that the
// reason was the same with it.
func hears(t testing.TB, c *Conn, alert Alert, said error) {
	t.Helper()
	f := (*Error)(nil)
	require.ErrorAs(t, said, &f)
	require.False(t, f.Remote)
	require.Equal(t, alert, f.Alert, "%v", said)
	for {
		_, _, err := c.record()
		if err != nil {
			heard := (*Error)(nil)
			require.ErrorAs(t, err, &heard)
			require.True(t, heard.Remote && heard.Alert == alert, "%v", err)
			return
		}
	}
}

// clientExts is where the extensions of a ClientHello of ours begin.
const clientExts = 4 + 2 + 32 + 1 + 2 + 4 + 2

// Each client breaks one rule of its first hello.
func TestHostileHello(t *testing.T) {
	change := func(f func([]piece) []piece) func([]byte) []byte {
		return func(msg []byte) []byte { return edit(t, msg, clientExts, f) }
	}
	set := func(at int, b ...byte) func([]byte) []byte {
		return func(msg []byte) []byte { copy(msg[at:], b); return msg }
	}
	for name, h := range map[string]struct {
		raw   func(msg []byte) []byte
		alert Alert
	}{
		"no extensions":       {func(msg []byte) []byte { return framed(1, msg[4:clientExts]) }, protocolVersion},
		"half a random":       {func(msg []byte) []byte { return framed(1, msg[4:20]) }, decodeError},
		"more at the end":     {func(msg []byte) []byte { return framed(1, append(msg[4:], 0)) }, decodeError},
		"empty":               {func([]byte) []byte { return framed(1, nil) }, decodeError},
		"32 KiB and more":     {func(msg []byte) []byte { return framed(1, make([]byte, maxMessage)) }, illegalParameter},
		"16 MiB":              {func(msg []byte) []byte { return []byte{1, 255, 255, 255} }, illegalParameter},
		"another message":     {func(msg []byte) []byte { return framed(2, msg[4:]) }, unexpectedMessage},
		"two messages":        {func(msg []byte) []byte { return append(msg, 1) }, unexpectedMessage},
		"version":             {set(4, 3, 1), illegalParameter},
		"compression":         {set(clientExts-1, 1), illegalParameter},
		"session ID of 33":    {set(4+34, 33), decodeError},
		"odd suites":          {set(4+35, 0, 3), decodeError},
		"no suites":           {set(4+35, 0, 0), decodeError},
		"no suite in common":  {set(4+37, 0x13, 2, 0x13, 2), handshakeFailure},
		"no versions":         {change(without(extVersions)), protocolVersion},
		"versions, empty":     {change(with(extVersions, 0)), decodeError},
		"versions, old":       {change(with(extVersions, 2, 3, 3)), protocolVersion},
		"versions, more":      {change(with(extVersions, 2, 3, 4, 0)), decodeError},
		"no key":              {change(without(extPreSharedKey)), handshakeFailure},
		"no modes":            {change(without(extPSKModes)), missingExtension},
		"modes, empty":        {change(with(extPSKModes, 0)), decodeError},
		"no DHE":              {change(with(extPSKModes, 1, 0)), handshakeFailure},
		"no groups":           {change(without(extSupportedGroups)), missingExtension},
		"groups, odd":         {change(with(extSupportedGroups, 0, 3, 0, 29, 0)), decodeError},
		"no shares":           {change(without(extKeyShare)), missingExtension},
		"shares, malformed":   {change(with(extKeyShare, 0, 3, 0, 29, 9)), decodeError},
		"shares, empty one":   {change(with(extKeyShare, 0, 4, 0, 29, 0, 0)), decodeError},
		"cookie, empty":       {change(with(extCookie, 0, 0)), decodeError},
		"early data":          {change(with(extEarlyData)), handshakeFailure},
		"twice":               {change(twice), illegalParameter},
		"key isn't last":      {change(func(l []piece) []piece { return append(l, piece{13, nil}) }), illegalParameter},
		"key, empty":          {change(with(extPreSharedKey)), decodeError},
		"key, no identity":    {change(with(extPreSharedKey, 0, 0, 0, 0)), decodeError},
		"key, no binder":      {change(with(extPreSharedKey, 0, 7, 0, 1, 'x', 0, 0, 0, 0, 0, 0)), decodeError},
		"key, short binder":   {change(with(extPreSharedKey, 0, 7, 0, 1, 'x', 0, 0, 0, 0, 0, 2, 1, 1)), decodeError},
		"key, empty identity": {change(with(extPreSharedKey, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0)), decodeError},
		"two binders": {change(with(extPreSharedKey, append([]byte{0, 7, 0, 1, 'x', 0, 0, 0, 0, 0, 66},
			append(append([]byte{32}, make([]byte, 32)...), append([]byte{32}, make([]byte, 32)...)...)...)...)), decodeError},
		"binder":         {func(msg []byte) []byte { msg[len(msg)-1] ^= 1; return msg }, decryptError},
		"head":           {set(4+2, 0, 0), decryptError},
		"more unknown":   {change(with(0xfafa, 1, 2, 3)), decryptError},
		"no group known": {change(func(l []piece) []piece { return with(extSupportedGroups, 0, 2, 0, 30)(with(extKeyShare, 0, 0)(l)) }), handshakeFailure},
	} {
		t.Run(name, func(t *testing.T) {
			one, two := pair(t)
			s := Server(two, testKeys)
			done := make(chan error, 1)
			go func() { done <- s.Handshake() }()
			c := Client(one, "alice", testKey)
			hello, _, err := c.client.hello()
			require.NoError(t, err)
			sends(t, c, h.raw(hello.bound(earlySecret(testKey), newTranscript())))
			hears(t, c, h.alert, <-done)
		})
	}
}

// Each client breaks one rule of its second hello.
func TestHostileRetry(t *testing.T) {
	for name, h := range map[string]struct {
		change func(h *clientHello)
		alert  Alert
	}{
		"as it should":  {func(*clientHello) {}, closeNotify},
		"no share":      {func(h *clientHello) { h.shares = nil }, illegalParameter},
		"two shares":    {func(h *clientHello) { h.shares = append(h.shares, h.shares[0]) }, illegalParameter},
		"other share":   {func(h *clientHello) { h.shares[0].group = groupP256 }, illegalParameter},
		"other random":  {func(h *clientHello) { h.random = noise(32) }, illegalParameter},
		"other session": {func(h *clientHello) { h.sessionID = noise(32) }, illegalParameter},
		"other suite":   {func(h *clientHello) { h.suites = h.suites[1:] }, illegalParameter},
		"share of 31":   {func(h *clientHello) { h.shares[0].data = noise(31) }, illegalParameter},
		"low order":     {func(h *clientHello) { h.shares[0].data = make([]byte, 32) }, illegalParameter},
		"other key":     {func(h *clientHello) { h.identities = [][]byte{[]byte("zoe")} }, decryptError},
	} {
		t.Run(name, func(t *testing.T) {
			one, two := pair(t)
			s := Server(two, testKeys)
			done := make(chan error, 1)
			go func() { done <- s.Handshake() }()
			c, seen := Client(one, "alice", testKey), newTranscript()
			hello, _, err := c.client.hello()
			require.NoError(t, err)
			hello.shares = []keyShare{{0x0019, noise(133)}}
			require.NoError(t, c.sendHello(hello, earlySecret(testKey), seen))
			sh, raw, err := c.serverHello(hello)
			require.NoError(t, err)
			require.True(t, sh.retry())
			private, err := hello.again(sh, nil)
			require.NoError(t, err)
			seen.retried()
			seen.Write(raw)
			h.change(hello)
			require.NoError(t, c.sendHello(hello, earlySecret(testKey), seen))
			if h.alert > 0 {
				hears(t, c, h.alert, <-done)
				return
			}
			sh, raw, err = c.serverHello(hello)
			require.NoError(t, err)
			seen.Write(raw)
			shared, err := exchange(private, sh.share)
			require.NoError(t, err)
			require.NoError(t, c.clientFinish(suites[0], earlySecret(testKey).next(shared), seen))
			require.NoError(t, <-done)
		})
	}
	t.Run("again and again", func(t *testing.T) {
		// The second hello has the group asked for, or it is refused: there
		// is no third.
		one, two := pair(t)
		s := Server(two, testKeys)
		done := make(chan error, 1)
		go func() { done <- s.Handshake() }()
		c := Client(one, "alice", testKey)
		hello, _, err := c.client.hello()
		require.NoError(t, err)
		hello.shares = []keyShare{{0x0019, noise(133)}}
		for range 2 {
			sends(t, c, hello.bound(earlySecret(testKey), newTranscript()))
		}
		hears(t, c, illegalParameter, <-done)
	})
}

// A fakeServer is one that says what a test wants it to.
type fakeServer struct {
	*Conn
	t     *testing.T
	hello *clientHello
	seen  transcript
	next  schedule
}

// serverExts is where the extensions of a ServerHello begin that has no
// session ID.
const serverExts = 4 + 2 + 32 + 1 + 2 + 1

// greet reads a hello and answers it, changed, but doesn't send the answer.
func (s *fakeServer) greet(change func(sh *serverHello)) []byte {
	hello, raw, err := s.clientHello()
	require.NoError(s.t, err)
	s.hello = hello
	s.seen.Write(raw)
	share := hello.shares[0]
	private, err := curve(share.group).GenerateKey(rand.Reader)
	require.NoError(s.t, err)
	shared, err := exchange(private, share)
	require.NoError(s.t, err)
	s.next = earlySecret(testKey).next(shared)
	sh := &serverHello{random: noise(32), suite: suites[0].id, share: keyShare{share.group, private.PublicKey().Bytes()}}
	change(sh)
	return sh.marshal()
}

// against runs a server's script with a client of ours, which must end by an
// alert.
func against(t *testing.T, alert Alert, script func(s *fakeServer)) {
	t.Helper()
	one, two := pair(t)
	c := Client(one, "alice", testKey)
	done := make(chan error, 1)
	go func() { done <- c.Handshake() }()
	s := &fakeServer{Conn: Server(two, testKeys), t: t, seen: newTranscript()}
	script(s)
	hears(t, s.Conn, alert, <-done)
}

// Each server breaks one rule of its hello.
func TestHostileServerHello(t *testing.T) {
	same := func(*serverHello) {}
	raw := func(msg []byte) []byte { return msg }
	change := func(f func([]piece) []piece) func([]byte) []byte {
		return func(msg []byte) []byte { return edit(t, msg, serverExts, f) }
	}
	retry := func(group uint16) func(*serverHello) {
		return func(sh *serverHello) { sh.random, sh.share = []byte(retryRandom), keyShare{group: group} }
	}
	for name, c := range map[string]struct {
		change func(*serverHello)
		raw    func([]byte) []byte
		alert  Alert
	}{
		"no extensions":       {same, func(msg []byte) []byte { return framed(2, msg[4:serverExts]) }, protocolVersion},
		"half":                {same, func(msg []byte) []byte { return framed(2, msg[4:20]) }, decodeError},
		"more at the end":     {same, func(msg []byte) []byte { return framed(2, append(msg[4:], 0)) }, decodeError},
		"another message":     {same, func(msg []byte) []byte { return framed(8, []byte{0, 0}) }, unexpectedMessage},
		"two messages":        {same, func(msg []byte) []byte { return append(msg, 8) }, unexpectedMessage},
		"version":             {same, func(msg []byte) []byte { msg[5] = 4; return msg }, illegalParameter},
		"compression":         {same, func(msg []byte) []byte { msg[serverExts-1] = 1; return msg }, illegalParameter},
		"session":             {func(sh *serverHello) { sh.sessionID = noise(32) }, raw, illegalParameter},
		"suite":               {func(sh *serverHello) { sh.suite = 0x1302 }, raw, illegalParameter},
		"group":               {func(sh *serverHello) { sh.share.group = groupP256 }, raw, illegalParameter},
		"index":               {func(sh *serverHello) { sh.index = 1 }, raw, illegalParameter},
		"share of 31":         {func(sh *serverHello) { sh.share.data = sh.share.data[1:] }, raw, illegalParameter},
		"low order":           {func(sh *serverHello) { clear(sh.share.data) }, raw, illegalParameter},
		"no version":          {same, change(without(extVersions)), protocolVersion},
		"another version":     {same, change(with(extVersions, 3, 3)), illegalParameter},
		"long version":        {same, change(with(extVersions, 3, 4, 0)), decodeError},
		"no key":              {same, change(without(extPreSharedKey)), handshakeFailure},
		"no DHE":              {same, change(without(extKeyShare)), missingExtension},
		"cookie":              {same, change(with(extCookie, 0, 1, 1)), unsupportedExtension},
		"unknown":             {same, change(with(0xfafa)), unsupportedExtension},
		"not for here":        {same, change(with(extSupportedGroups, 0, 2, 0, 29)), unsupportedExtension},
		"twice":               {same, change(twice), illegalParameter},
		"retry, same":         {retry(groupX25519), raw, illegalParameter},
		"retry, unknown":      {retry(0x0019), raw, illegalParameter},
		"retry for nothing":   {retry(groupP256), change(without(extKeyShare)), illegalParameter},
		"retry with a key":    {retry(groupP256), change(with(extPreSharedKey, 0, 0)), unsupportedExtension},
		"retry, no version":   {retry(groupP256), change(without(extVersions)), protocolVersion},
		"retry, empty cookie": {retry(groupP256), change(with(extCookie, 0, 0)), decodeError},
	} {
		t.Run(name, func(t *testing.T) {
			against(t, c.alert, func(s *fakeServer) { sends(t, s.Conn, c.raw(s.greet(c.change))) })
		})
	}
	for name, second := range map[string]func(*serverHello){
		"retry twice":               retry(groupP256),
		"retry, then another suite": func(sh *serverHello) { sh.suite = suites[1].id },
	} {
		t.Run(name, func(t *testing.T) {
			against(t, illegalParameter, func(s *fakeServer) {
				sends(t, s.Conn, s.greet(retry(groupP256)))
				sends(t, s.Conn, s.greet(second))
			})
		})
	}
}

// A server that asks for a cookie, however long, gets it, and with it the same
// share.
func TestCookie(t *testing.T) {
	one, two := pair(t)
	c := Client(one, "alice", testKey)
	done := make(chan error, 1)
	go func() { done <- c.Handshake() }()
	s := &fakeServer{Conn: Server(two, testKeys), t: t, seen: newTranscript()}
	msg := edit(t, s.greet(func(sh *serverHello) { sh.random, sh.share, sh.cookie = []byte(retryRandom), keyShare{}, noise(20_000) }),
		serverExts, without(extKeyShare))
	first := s.hello
	s.seen.retried()
	s.seen.Write(msg)
	sends(t, s.Conn, msg)
	hello, raw, err := s.clientHello()
	require.NoError(t, err)
	require.Len(t, hello.cookie, 20_000)
	require.Equal(t, first.shares, hello.shares)
	_, _, err = s.pick(hello, raw, s.seen)
	require.NoError(t, err)
	require.NoError(t, two.Close())
	require.Error(t, <-done)
}

// Each server breaks one rule behind its hello.
func TestHostileServerFinish(t *testing.T) {
	extensions := framed(typeEncryptedExtensions, []byte{0, 0})
	for name, c := range map[string]struct {
		msgs  [][]byte
		alert Alert
	}{
		"no extensions":      {[][]byte{framed(typeFinished, make([]byte, 32))}, unexpectedMessage},
		"bad extensions":     {[][]byte{framed(typeEncryptedExtensions, []byte{0, 1})}, decodeError},
		"half an extension":  {[][]byte{framed(typeEncryptedExtensions, []byte{0, 1, 0})}, decodeError},
		"bad groups":         {[][]byte{framed(typeEncryptedExtensions, []byte{0, 4, 0, 10, 0, 0})}, decodeError},
		"unknown extension":  {[][]byte{framed(typeEncryptedExtensions, []byte{0, 4, 0, 0, 0, 0})}, unsupportedExtension},
		"early data":         {[][]byte{framed(typeEncryptedExtensions, []byte{0, 4, 0, 42, 0, 0})}, unsupportedExtension},
		"certificate wanted": {[][]byte{extensions, framed(13, []byte{0, 0, 0})}, unexpectedMessage},
		"certificate":        {[][]byte{extensions, framed(11, []byte{0, 0, 0, 0})}, unexpectedMessage},
		"wrong Finished":     {[][]byte{extensions, framed(typeFinished, make([]byte, 32))}, decryptError},
		"short Finished":     {[][]byte{extensions, framed(typeFinished, make([]byte, 31))}, decodeError},
		"more behind it":     {[][]byte{extensions, append(framed(typeFinished, make([]byte, 32)), 4)}, unexpectedMessage},
	} {
		t.Run(name, func(t *testing.T) {
			against(t, c.alert, func(s *fakeServer) {
				msg := s.greet(func(*serverHello) {})
				s.seen.Write(msg)
				s.protect(typeHandshake, msg)
				client, server := s.next.traffic("hs", s.seen.sum())
				s.out.use(suites[0], server)
				s.in.use(suites[0], client)
				for _, m := range c.msgs {
					s.protect(typeHandshake, m)
				}
				require.NoError(t, s.flush())
			})
		})
	}
}

// A client's Finished is verified.
func TestHostileClientFinish(t *testing.T) {
	for name, c := range map[string]struct {
		typ   byte
		data  []byte
		alert Alert
	}{
		"wrong":       {typeHandshake, framed(typeFinished, make([]byte, 32)), decryptError},
		"short":       {typeHandshake, framed(typeFinished, nil), decodeError},
		"certificate": {typeHandshake, framed(11, []byte{0, 0, 0, 0}), unexpectedMessage},
		"content":     {typeData, []byte("x"), unexpectedMessage},
	} {
		t.Run(name, func(t *testing.T) {
			one, two := pair(t)
			s := Server(two, testKeys)
			done := make(chan error, 1)
			go func() { done <- s.Handshake() }()
			cl, seen := Client(one, "alice", testKey), newTranscript()
			hello, private, err := cl.client.hello()
			require.NoError(t, err)
			require.NoError(t, cl.sendHello(hello, earlySecret(testKey), seen))
			sh, raw, err := cl.serverHello(hello)
			require.NoError(t, err)
			seen.Write(raw)
			shared, err := exchange(private, sh.share)
			require.NoError(t, err)
			handshake := earlySecret(testKey).next(shared)
			client, server := handshake.traffic("hs", seen.sum())
			cl.in.use(suites[0], server)
			cl.out.use(suites[0], client)
			msg, err := cl.message(typeEncryptedExtensions)
			require.NoError(t, err)
			seen.Write(msg)
			require.NoError(t, cl.takeFinished(server, seen))
			_, app := handshake.next(make([]byte, hashLen)).traffic("ap", seen.sum())
			cl.in.use(suites[0], app)
			cl.protect(c.typ, c.data)
			require.NoError(t, cl.flush())
			hears(t, cl, c.alert, <-done)
		})
	}
}

// Each peer breaks one rule after the handshake.
func TestHostileRecords(t *testing.T) {
	type rec struct {
		typ  byte
		data []byte
	}
	update := []byte{typeKeyUpdate, 0, 0, 1, 0}
	many := func(r rec) (list []rec) {
		for range maxUseless + 1 {
			list = append(list, r)
		}
		return list
	}
	for name, h := range map[string]struct {
		recs  []rec
		alert Alert
	}{
		"no content for ever":  {many(rec{typeData, nil}), unexpectedMessage},
		"tickets for ever":     {many(rec{typeHandshake, framed(typeNewSessionTicket, noise(100))}), unexpectedMessage},
		"user_canceled":        {many(rec{typeAlert, []byte{1, 90}}), unexpectedMessage},
		"empty handshake":      {[]rec{{typeHandshake, nil}}, unexpectedMessage},
		"empty alert":          {[]rec{{typeAlert, nil}}, decodeError},
		"two alerts":           {[]rec{{typeAlert, []byte{1, 0, 1, 0}}}, decodeError},
		"change_cipher_spec":   {[]rec{{typeChangeCipherSpec, []byte{1}}}, unexpectedMessage},
		"unknown type":         {[]rec{{99, []byte("x")}}, unexpectedMessage},
		"padding alone":        {[]rec{{0, make([]byte, 10)}}, unexpectedMessage},
		"hello again":          {[]rec{{typeHandshake, framed(typeClientHello, noise(10))}}, unexpectedMessage},
		"certificate wanted":   {[]rec{{typeHandshake, framed(13, noise(10))}}, unexpectedMessage},
		"message of 16 MiB":    {[]rec{{typeHandshake, []byte{4, 255, 255, 255}}}, illegalParameter},
		"interrupted message":  {[]rec{{typeHandshake, []byte{4, 0, 0, 9}}, {typeData, []byte("x")}}, unexpectedMessage},
		"alert in a message":   {[]rec{{typeHandshake, []byte{4, 0, 0, 9}}, {typeAlert, []byte{1, 0}}}, unexpectedMessage},
		"long update":          {[]rec{{typeHandshake, framed(typeKeyUpdate, []byte{0, 0})}}, decodeError},
		"update to 2":          {[]rec{{typeHandshake, framed(typeKeyUpdate, []byte{2})}}, illegalParameter},
		"update with more":     {[]rec{{typeHandshake, append(bytes.Clone(update), 4)}}, unexpectedMessage},
		"update under old key": {[]rec{{typeHandshake, update}, {typeData, []byte("x")}}, badRecordMAC},
		"too long":             {[]rec{{typeData, make([]byte, maxPlain+1)}}, recordOverflow},
		"far too long":         {[]rec{{typeData, make([]byte, maxCipher)}}, recordOverflow},
	} {
		t.Run(name, func(t *testing.T) {
			c, s := linked(t)
			for _, r := range h.recs {
				s.protect(r.typ, r.data)
			}
			require.NoError(t, s.flush())
			_, err := c.Read(make([]byte, 1))
			hears(t, s, h.alert, err)
		})
	}
	plain := map[string][]byte{"content": {typeData, 3, 3, 0, 1, 'x'}, "alert": {typeAlert, 3, 3, 0, 2, 1, 0},
		"handshake": {typeHandshake, 3, 3, 0, 5, 24, 0, 0, 1, 0}, "change_cipher_spec": {typeChangeCipherSpec, 3, 3, 0, 1, 1}, "other": {1, 3, 3, 0, 0}}
	for name, p := range plain {
		t.Run("in the clear, "+name, func(t *testing.T) {
			c, s := linked(t)
			_, err := s.nc.Write(p)
			require.NoError(t, err)
			_, err = c.Read(make([]byte, 1))
			f := (*Error)(nil)
			require.ErrorAs(t, err, &f)
			require.False(t, f.Remote)
			hears(t, s, f.Alert, err)
		})
	}
	t.Run("ticket of a client", func(t *testing.T) {
		c, s := linked(t)
		sends(t, c, framed(typeNewSessionTicket, noise(100)))
		_, err := s.Read(make([]byte, 1))
		hears(t, c, unexpectedMessage, err)
	})
}
