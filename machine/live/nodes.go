package live

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"nvstore.dev/image"
)

// A node is a block node of QEMU's.
type node struct {
	Name     string `json:"node-name"`
	Driver   string `json:"drv"`
	ReadOnly bool   `json:"ro"`
	File     string
	Image    struct {
		Size      int64 `json:"virtual-size"`
		Encrypted bool  // by itself
		Snapshots []snapshotInfo
	}
}

// A snapshotInfo is what QEMU says of a node's internal snapshot.
type snapshotInfo struct {
	ID          string
	Name        string
	VMStateSize int64  `json:"vm-state-size"`
	Seconds     int64  `json:"date-sec"`
	Nanoseconds int64  `json:"date-nsec"`
	ClockSec    int64  `json:"vm-clock-sec"`
	ClockNsec   int64  `json:"vm-clock-nsec"`
	ICount      *int64 `json:"icount"`
}

func (n *node) snapshot(tag string) *snapshotInfo {
	for i := range n.Image.Snapshots {
		if n.Image.Snapshots[i].Name == tag {
			return &n.Image.Snapshots[i]
		}
	}
	return nil
}

// maxStack bounds how many nodes lie on each other.
const maxStack = 32

// leaf is the file at the bottom. QEMU describes a stack by a name if it can,
// and else by "json:" and options, nested.
func (n *node) leaf() string {
	text, ok := strings.CutPrefix(n.File, "json:")
	if !ok {
		return n.File
	}
	type layer struct {
		Filename string
		File     json.RawMessage
	}
	for range maxStack {
		var l layer
		if json.Unmarshal([]byte(text), &l) != nil {
			return ""
		}
		if len(l.File) == 0 {
			return l.Filename
		}
		text = string(l.File)
	}
	return ""
}

type nodes []node

// nodes asks for all of them.
func (m *Machine) nodes(ctx context.Context) (nodes, error) {
	var list nodes
	err := m.qmp.Do(ctx, "query-named-block-nodes", map[string]bool{"flat": true}, &list)
	return list, err
}

func (list nodes) named(name string) *node {
	for i := range list {
		if list[i].Name == name {
			return &list[i]
		}
	}
	return nil
}

func (list nodes) need(name string) (*node, error) {
	if n := list.named(name); n != nil {
		return n, nil
	}
	return nil, fmt.Errorf("%w: %q", ErrNode, name)
}

// A set are the nodes that take part in a snapshot.
type set struct {
	devices []*node
	vmstate *node // one of them, which gets the memory
}

func (s *set) names() []string {
	names := make([]string, len(s.devices))
	for i, n := range s.devices {
		names[i] = n.Name
	}
	return names
}

// set finds who takes part in snapshots. The memory goes where the state is.
func (m *Machine) set(ctx context.Context) (*set, error) {
	list, err := m.nodes(ctx)
	if err != nil {
		return nil, err
	}
	s := new(set)
	for _, name := range m.opts.Devices {
		n, err := list.need(name)
		if err != nil {
			return nil, err
		}
		s.devices = append(s.devices, n)
	}
	if len(m.opts.Devices) == 0 {
		if err := s.collect(list); err != nil {
			return nil, err
		}
	}
	s.vmstate = s.devices[0]
	if n := list.named(m.opts.Node); n != nil {
		for _, d := range s.devices {
			if d.leaf() == n.leaf() {
				s.vmstate = d
			}
		}
	}
	return s, nil
}

// memory refuses to have QEMU write or read a machine's memory in an image that
// is encrypted by itself: it aborts (7.2).
func (s *set) memory() error {
	if n := s.vmstate; n.Driver == "qcow2" && n.Image.Encrypted {
		return fmt.Errorf("block node %q is a qcow2 encrypted by itself, and QEMU aborts when a machine's memory goes there; a qcow2 in a LUKS container can take it: %w",
			n.Name, image.ErrUnsupported)
	}
	return nil
}

// collect takes all qcow2 nodes that are written, and refuses what is written
// and has no snapshots: it wouldn't be reverted.
func (s *set) collect(list nodes) error {
	var files []string
	for i := range list {
		if n := &list[i]; n.Driver == "qcow2" && !n.ReadOnly {
			s.devices = append(s.devices, n)
			files = append(files, n.leaf())
		}
	}
	for i := range list {
		if n := &list[i]; !n.ReadOnly && !slices.Contains(files, n.leaf()) {
			return fmt.Errorf("block node %q (%s) is written, and has no snapshots: %w", n.Name, n.Driver, image.ErrUnsupported)
		}
	}
	if len(s.devices) == 0 {
		return fmt.Errorf("no block node has snapshots: %w", image.ErrUnsupported)
	}
	return nil
}
