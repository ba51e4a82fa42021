package live

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// A drive is what QEMU says of a device's drive.
type drive struct {
	QDev     string // the device's ID, or its path in QOM
	Inserted *node
}

// Devices that have a copy of their drive in memory and don't read it again
// when a snapshot is loaded, by their types in QOM.
const (
	typeAT24C  = "at24c-eeprom"
	typeM25P80 = "m25p80-generic" // what all parts of that model are
)

// firstAT24C is the first QEMU whose at24c-eeprom doesn't read its drive in a
// reset, while loading a snapshot keeps all requests back: before, QEMU hangs.
const firstAT24C = 10

// follows refuses to load a snapshot where a device of the machine wouldn't
// follow, or QEMU hang.
func (m *Machine) follows(ctx context.Context, s *set) error {
	var drives []drive
	if err := m.qmp.Do(ctx, "query-block", nil, &drives); err != nil {
		return err
	}
	flash, err := m.types(ctx, typeM25P80)
	if err != nil {
		return err
	}
	for _, d := range drives {
		if d.Inserted == nil || d.QDev == "" {
			continue
		}
		kind := m.typeOf(ctx, d.QDev)
		stale := s.has(d.Inserted) && !d.Inserted.ReadOnly && !m.opts.Stale
		switch {
		case kind == typeAT24C && m.qmp.Version().Major < firstAT24C:
			return fmt.Errorf("%w: QEMU %s would hang with the drive of %s (%s)", ErrDevice, m.Version(), d.QDev, kind)
		case stale && (kind == typeAT24C || slices.Contains(flash, kind)):
			return fmt.Errorf("%w: %s (%s) would go on with the bytes from before, and write them back", ErrDevice, d.QDev, kind)
		}
	}
	return nil
}

// has tells whether a node lies on one that takes part.
func (s *set) has(n *node) bool {
	leaf := n.leaf()
	return slices.ContainsFunc(s.devices, func(d *node) bool { return d.leaf() == leaf })
}

// types lists what a type's kin are. A QEMU that doesn't know the type has none.
func (m *Machine) types(ctx context.Context, parent string) (names []string, err error) {
	var list []struct{ Name string }
	err = m.qmp.Do(ctx, "qom-list-types", map[string]any{"implements": parent}, &list)
	for _, t := range list {
		names = append(names, t.Name)
	}
	return names, err
}

// typeOf is a device's type; empty if QEMU names the device by what is no path.
func (m *Machine) typeOf(ctx context.Context, qdev string) (kind string) {
	if !strings.HasPrefix(qdev, "/") {
		qdev = "/machine/peripheral/" + qdev
	}
	_ = m.qmp.Do(ctx, "qom-get", map[string]string{"path": qdev, "property": "type"}, &kind)
	return kind
}
