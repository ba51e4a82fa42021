// Package nbd speaks the Network Block Device protocol, as
// https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md has it,
// both ways: Open returns an export of a server as an image.Device, and Server
// exports Devices.
//
// Both ends speak fixed newstyle with INFO, GO and EXPORT_NAME, structured
// replies, block status (base:allocation), FLUSH, FUA, TRIM, WRITE_ZEROES with
// NO_HOLE and FAST_ZERO, block size constraints, and TLS: 1.2 and 1.3 with
// certificates, or 1.3 with pre-shared keys.
//
// # Durability
//
// A Device's Sync is a FLUSH: it returns nil when the server has answered it.
// A server that offers no FLUSH but FUA gets FUA with every write; one that
// offers neither can't be opened for writing.
//
// # Reconnecting
//
// If the connection is lost while nothing is at stake, because all writes were
// followed by a Sync that returned nil, requests wait for a new connection and
// go on. If anything written since is not known to be durable, the Device is
// poisoned, and all later calls fail with image.ErrPoisoned. The writes are
// not sent again: while the connection was down, a machine's snapshot may have
// been loaded or another writer may have come, and a write of the past would
// damage what is there now. Who reopens the Device reads before he writes.
//
// # The peer
//
// Either end takes the other for an enemy: lengths are checked before anything
// is allocated, replies must fit the request they answer, the number of
// replies is bounded, and everything that waits for the peer has a timeout.
package nbd
