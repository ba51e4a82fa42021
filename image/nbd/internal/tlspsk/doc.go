// Package tlspsk is TLS 1.3 (RFC 8446) with an external pre-shared key and
// nothing else, because crypto/tls has no external keys. Both ends prove that
// they have the key; (EC)DHE gives forward secrecy. There are no certificates,
// no earlier versions, no resumption, no early data, and no key exchange
// without (EC)DHE.
//
// What is there: psk_dhe_ke with X25519 and P-256, HelloRetryRequest, the two
// cipher suites of TLS 1.3 with SHA-256 that all peers have (an external key
// is bound to one hash, which is SHA-256 unless somebody says otherwise:
// section 4.2.11), KeyUpdate, alerts, padding, and the change_cipher_spec
// records of middlebox compatibility (appendix D.4).
//
// # What a key must be
//
// Random. Whoever sees one ClientHello can try keys against its binder for as
// long as he likes (section 2.2). And one for each pair of a client and a
// server: whoever has a key can be either end (RFC 9257, section 4).
//
// # The peer
//
// All that comes is an enemy's until the handshake is over: records are at
// most 2^14+256 bytes, handshake messages 32 KiB, and what isn't content
// (tickets, updates of keys, empty records) comes 32 times in a row at most.
// An end of the stream without close_notify is io.ErrUnexpectedEOF.
package tlspsk
