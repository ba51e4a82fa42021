package luks

import (
	"bytes"
	"fmt"
	"io"

	"nvstore.dev/image"
)

// BackupHeader writes a copy of the header and all key areas to w, as
// "cryptsetup luksHeaderBackup" does: bytes from the image's start, zeros in
// the gap between. Whoever has the copy and a passphrase that opened the image
// then can open the image for ever, also after the passphrase was changed.
func BackupHeader(d image.Device, w io.Writer) error {
	h, err := readHeader(d)
	if err != nil {
		return err
	}
	head, areas, end := h.extent()
	if d.Size() < end {
		return fmt.Errorf("%w: %d bytes, header and key areas have %d", ErrTruncated, d.Size(), end)
	}
	p := make([]byte, areas)
	if err := image.ReadFull(d, p[:head], 0); err != nil {
		return err
	}
	if _, err := w.Write(p); err != nil {
		return err
	}
	_, err = io.Copy(w, io.NewSectionReader(d, areas, end-areas))
	return err
}

// RestoreHeader writes a backup over the header and the key areas of d. The
// passphrases of the time of the backup open d from then on, and no later ones.
//
// The header of d must be readable and have the backup's UUID; with force, one
// that can't be read is replaced too, and so is one of another UUID. A readable
// one with another place or cipher for the payload is never replaced. All these
// give ErrOther.
//
// What is the same already isn't written. The key areas come first, and then
// the header; after an interruption, restore once more.
func RestoreHeader(d, backup image.Device, force bool) error {
	b, err := readHeader(backup)
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	head, areas, end := b.extent()
	if backup.Size() < end {
		return fmt.Errorf("backup: %w: %d bytes, header and key areas have %d", ErrTruncated, backup.Size(), end)
	}
	if d.Size() < end {
		return fmt.Errorf("%d bytes, header and key areas need %d: %w", d.Size(), end, image.ErrNoSpace)
	}
	if err := sameImage(d, b, force); err != nil {
		return err
	}
	if err := copyChanged(d, backup, areas, end); err != nil {
		return err
	}
	if _, ok := b.(*v2); ok {
		// The first header is what is read first, and so is written last.
		if err := copyChanged(d, backup, head/2, head); err != nil {
			return err
		}
		head /= 2
	}
	return copyChanged(d, backup, 0, head)
}

func sameImage(d image.Device, backup header, force bool) error {
	h, err := readHeader(d)
	if err != nil {
		if force {
			return nil
		}
		return fmt.Errorf("%w: the header to be replaced can't be read: %v", ErrOther, err)
	}
	have, want := h.layout(), backup.layout()
	switch a, b := h.info(), backup.info(); {
	case a.Version != b.Version:
		return fmt.Errorf("%w: version %d, the backup's is %d", ErrOther, a.Version, b.Version)
	case have != want:
		return fmt.Errorf("%w: the payload (%s, key of %d bytes, at %d) isn't the backup's (%s, %d bytes, at %d)", ErrOther,
			a.Encryption, a.KeySize, a.PayloadOffset, b.Encryption, b.KeySize, b.PayloadOffset)
	case a.UUID != b.UUID && !force:
		return fmt.Errorf("%w: UUID %q, the backup's is %q", ErrOther, a.UUID, b.UUID)
	}
	return nil
}

// copyChanged copies [from, to), but for blocks that are the same already, and
// makes it durable.
func copyChanged(dst, src image.Device, from, to int64) error {
	const step = 64 << 10
	p, q := make([]byte, step), make([]byte, step)
	for at := from; at < to; at += step {
		n := min(step, to-at)
		if err := image.ReadFull(src, p[:n], at); err != nil {
			return err
		}
		// What can't be read is written.
		if err := image.ReadFull(dst, q[:n], at); err == nil && bytes.Equal(p[:n], q[:n]) {
			continue
		}
		if _, err := dst.WriteAt(p[:n], at); err != nil {
			return err
		}
	}
	return dst.Sync()
}

// RepairHeader makes a damaged or stale LUKS2 header equal to the other one,
// and tells whether there was anything to do. LUKS1 has no second header.
func RepairHeader(d image.Device) (repaired bool, err error) {
	h, err := readHeader(d)
	if err != nil {
		return false, err
	}
	v, ok := h.(*v2)
	if !ok || v.damaged == nil {
		return false, nil
	}
	return true, writeCopies(d, *v.bin, v.text)
}
