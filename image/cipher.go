package image

// SectorSize is the unit that disk encryption works in, in bytes.
const SectorSize = 512

// A SectorCipher encrypts a disk sector by sector, in place. The length of p is
// a multiple of SectorSize; sector is the number that the first one's
// initialization vector is made of, and the others count on from there. It is
// safe for concurrent use.
type SectorCipher interface {
	Encrypt(p []byte, sector uint64) error
	Decrypt(p []byte, sector uint64) error
}
