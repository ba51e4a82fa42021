package live

import (
	"context"
	"errors"
	"fmt"
	"time"

	"nvstore.dev/image"
	"nvstore.dev/internal/qmp"
)

// A Snapshot is one of disk, memory and state, or what is there of one.
type Snapshot struct {
	ID          string   `json:"id"`
	Name        string   `json:"name"`
	Seconds     int64    `json:"date_sec"`
	Nanoseconds int64    `json:"date_nsec"`
	VMStateSize int64    `json:"vm_state_size"` // 0: it has no memory, and can be loaded only while the machine is off
	VMClock     int64    `json:"vm_clock_nsec"`
	ICount      *int64   `json:"icount,omitempty"`
	Devices     []string `json:"devices"`           // block nodes that have it
	Missing     []string `json:"missing,omitempty"` // and that haven't: it can't be loaded
}

// Snapshots lists the snapshots of the nodes that take part.
func (m *Machine) Snapshots(ctx context.Context) ([]Snapshot, error) {
	s, err := m.set(ctx)
	if err != nil {
		return nil, err
	}
	list := []Snapshot{}
	seen := map[string]int{}
	for _, n := range append([]*node{s.vmstate}, s.devices...) {
		for _, i := range n.Image.Snapshots {
			if _, ok := seen[i.Name]; ok {
				continue
			}
			seen[i.Name] = len(list)
			x := Snapshot{ID: i.ID, Name: i.Name, Seconds: i.Seconds, Nanoseconds: i.Nanoseconds, VMStateSize: i.VMStateSize,
				VMClock: i.ClockSec*1e9 + i.ClockNsec, ICount: i.ICount}
			x.Devices, x.Missing = s.having(i.Name)
			list = append(list, x)
		}
	}
	return list, nil
}

// having tells which nodes have a snapshot, and which haven't.
func (s *set) having(tag string) (have, lack []string) {
	for _, n := range s.devices {
		if n.snapshot(tag) != nil {
			have = append(have, n.Name)
		} else {
			lack = append(lack, n.Name)
		}
	}
	return have, lack
}

// Save takes a snapshot of disk, memory and state. Writers of the store are kept
// out meanwhile, and the machine goes on afterwards as it was, running or not. A
// tag that is there already is image.ErrExist. A snapshot that fails leaves
// nothing behind. progress may be nil.
func (m *Machine) Save(ctx context.Context, tag string, progress func(done, total int64)) error {
	s, err := m.set(ctx)
	if err != nil {
		return err
	}
	if tag == "" {
		return fmt.Errorf("a snapshot without a name: %w", image.ErrUnsupported)
	}
	if have, _ := s.having(tag); len(have) > 0 {
		return fmt.Errorf("snapshot %q: %w", tag, image.ErrExist)
	}
	if err := s.memory(); err != nil {
		return err
	}
	_, running, err := m.Status(ctx)
	if err != nil {
		return err
	}
	return m.quiesced(ctx, func() error {
		err := m.job(ctx, "snapshot-save", s, tag, progress)
		if err == nil || ctx.Err() != nil {
			return err
		}
		return errors.Join(err, m.unsave(ctx, tag, running))
	})
}

// unsave takes back what a failed snapshot left.
func (m *Machine) unsave(ctx context.Context, tag string, running bool) error {
	s, err := m.set(ctx)
	if err != nil {
		return err
	}
	if have, _ := s.having(tag); len(have) > 0 {
		err = m.job(ctx, "snapshot-delete", s, tag, nil)
	}
	if _, now, e := m.Status(ctx); e == nil && running && !now {
		err = errors.Join(err, m.qmp.Do(ctx, "cont", nil, nil))
	}
	return err
}

// Load makes disk, memory and state what they were at a snapshot. Writers of the
// store are kept out meanwhile, and what they hadn't committed is dropped; the
// machine goes on afterwards as it was, running or not. A tag that isn't there
// on all nodes is image.ErrNotFound, a snapshot without memory
// image.ErrUnsupported, and one that a device wouldn't follow ErrDevice; then
// nothing was changed. If QEMU fails, the machine stands still, and the error is
// also ErrStopped.
func (m *Machine) Load(ctx context.Context, tag string, progress func(done, total int64)) error {
	s, err := m.set(ctx)
	if err != nil {
		return err
	}
	switch have, lack := s.having(tag); {
	case len(have) == 0:
		return fmt.Errorf("snapshot %q: %w", tag, image.ErrNotFound)
	case len(lack) > 0:
		return fmt.Errorf("snapshot %q on block node %q: %w", tag, lack[0], image.ErrNotFound)
	}
	if s.vmstate.snapshot(tag).VMStateSize == 0 {
		return fmt.Errorf("snapshot %q has no memory, so a machine that runs can't be reverted to it: %w", tag, image.ErrUnsupported)
	}
	if err := s.memory(); err != nil {
		return err
	}
	if err := m.follows(ctx, s); err != nil {
		return err
	}
	_, running, err := m.Status(ctx)
	if err != nil {
		return err
	}
	return m.quiesced(ctx, func() error {
		err := m.job(ctx, "snapshot-load", s, tag, progress)
		if e := (*qmp.JobError)(nil); !errors.As(err, &e) {
			return err
		}
		if state, now, e := m.Status(ctx); e == nil && running && !now {
			err = fmt.Errorf("%w (%s): %w", ErrStopped, state, err)
		}
		return err
	})
}

// Delete removes a snapshot from all nodes that have it. One that none has is
// image.ErrNotFound.
func (m *Machine) Delete(ctx context.Context, tag string, progress func(done, total int64)) error {
	s, err := m.set(ctx)
	if err != nil {
		return err
	}
	if have, _ := s.having(tag); len(have) == 0 {
		return fmt.Errorf("snapshot %q: %w", tag, image.ErrNotFound)
	}
	return m.job(ctx, "snapshot-delete", s, tag, progress)
}

func (m *Machine) job(ctx context.Context, command string, s *set, tag string, progress func(done, total int64)) error {
	args := map[string]any{"tag": tag, "devices": s.names()}
	if command != "snapshot-delete" {
		args["vmstate"] = s.vmstate.Name
	}
	var report func(qmp.Job)
	if progress != nil {
		report = func(j qmp.Job) { progress(j.Current, j.Total) }
	}
	return m.qmp.RunJob(ctx, command, args, report)
}

// quiesced runs fn while no writer of the store is in the middle of a commit.
func (m *Machine) quiesced(ctx context.Context, fn func() error) error {
	wait, cancel := context.WithTimeout(ctx, m.opts.Timeout)
	defer cancel()
	open, err := m.lock.shut(wait)
	if err != nil {
		if ctx.Err() == nil {
			return fmt.Errorf("%w within %v", ErrWriters, m.opts.Timeout.Round(time.Millisecond))
		}
		return ctx.Err()
	}
	defer open()
	return fn()
}

// Load is Machine.Load, and the store shows what there is then when it returns.
func (a *Attachment) Load(ctx context.Context, tag string, progress func(done, total int64)) error {
	err := a.Machine.Load(ctx, tag, progress)
	a.refresh(false)
	return err
}
