package tlspsk

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"hash"
)

const hashLen = sha256.Size

// extract is HKDF-Extract. A nil salt is zeros (RFC 5869, section 2.2).
func extract(salt, secret []byte) []byte {
	prk, err := hkdf.Extract(sha256.New, secret, salt)
	if err != nil {
		panic("internal error: " + err.Error())
	}
	return prk
}

// expandLabel is HKDF-Expand-Label (RFC 8446, section 7.1). Labels and lengths
// are our own.
func expandLabel(secret []byte, label string, context []byte, n int) []byte {
	info := binary.BigEndian.AppendUint16(make([]byte, 0, 64), uint16(n))
	info = append(info, byte(len("tls13 ")+len(label)))
	info = append(info, "tls13 "+label...)
	info = append(info, byte(len(context)))
	info = append(info, context...)
	out, err := hkdf.Expand(sha256.New, secret, string(info), n)
	if err != nil {
		panic("internal error: " + err.Error())
	}
	return out
}

// deriveSecret is Derive-Secret, of a transcript's hash.
func deriveSecret(secret []byte, label string, transcript []byte) []byte {
	return expandLabel(secret, label, transcript, hashLen)
}

// afterNothing is the hash of no messages.
func afterNothing() []byte {
	h := sha256.Sum256(nil)
	return h[:]
}

// finishedMAC is the verify_data of a Finished (section 4.4.4), and a binder,
// which is computed as one (section 4.2.11.2).
func finishedMAC(base, transcript []byte) []byte {
	m := hmac.New(sha256.New, expandLabel(base, "finished", nil, hashLen))
	m.Write(transcript)
	return m.Sum(nil)
}

// A schedule is the key schedule (section 7.1) at one of its three secrets.
type schedule struct{ secret []byte }

// earlySecret begins the schedule.
func earlySecret(psk []byte) schedule { return schedule{extract(nil, psk)} }

// binder is that of an external key. A resumption's has another label.
func (s schedule) binder(transcript []byte) []byte {
	return finishedMAC(deriveSecret(s.secret, "ext binder", afterNothing()), transcript)
}

// next goes from the early to the handshake secret by what (EC)DHE gave, and
// from that to the master secret by zeros.
func (s schedule) next(input []byte) schedule {
	return schedule{extract(deriveSecret(s.secret, "derived", afterNothing()), input)}
}

// traffic returns the secrets that clients and servers write under, during
// the handshake ("hs") or after it ("ap").
func (s schedule) traffic(phase string, transcript []byte) (client, server []byte) {
	return deriveSecret(s.secret, "c "+phase+" traffic", transcript), deriveSecret(s.secret, "s "+phase+" traffic", transcript)
}

// A transcript is the hash of the handshake's messages (section 4.4.1).
type transcript struct{ hash.Hash }

func newTranscript() transcript { return transcript{sha256.New()} }

func (t transcript) sum() []byte { return t.Sum(nil) }

// with is sum as if p had been written too.
func (t transcript) with(p []byte) []byte {
	c, err := t.Hash.(hash.Cloner).Clone()
	if err != nil {
		panic("internal error: " + err.Error())
	}
	_, _ = c.Write(p)
	return c.Sum(nil)
}

// retried has the first ClientHello, which is all that was written, count by
// its hash alone, as a HelloRetryRequest asks for.
func (t transcript) retried() {
	h := t.sum()
	t.Reset()
	t.Write([]byte{typeMessageHash, 0, 0, hashLen})
	t.Write(h)
}
