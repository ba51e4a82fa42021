package qmp

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"time"
)

// A Job is what query-jobs says of one.
type Job struct {
	ID      string
	Type    string
	Status  string // created, running, ..., concluded
	Error   string // why it failed, once it is concluded
	Current int64  `json:"current-progress"`
	Total   int64  `json:"total-progress"`
}

// Jobs returns the jobs that QEMU has.
func (c *Client) Jobs(ctx context.Context) ([]Job, error) {
	var list []Job
	err := c.Do(ctx, "query-jobs", nil, &list)
	return list, err
}

// pollJobs is how often a job is looked at, besides when QEMU tells.
const pollJobs = 250 * time.Millisecond

// RunJob runs a command that begins a job, with an ID of its own among args,
// and waits until the job has ended; what it leaves is dismissed. A job that
// failed is a *JobError. progress, which may be nil, is told now and then how
// far it is.
//
// If ctx ends first, the job is cancelled, as far as QEMU can: snapshots go on
// in QEMU, which answers only afterwards.
func (c *Client) RunJob(ctx context.Context, command string, args map[string]any, progress func(Job)) error {
	var random [8]byte
	if _, err := rand.Read(random[:]); err != nil {
		return err
	}
	id := "nvstore-" + hex.EncodeToString(random[:])
	args = maps.Clone(args)
	if args == nil {
		args = make(map[string]any)
	}
	args["job-id"] = id
	sub := c.Subscribe("JOB_STATUS_CHANGE")
	defer sub.Close()
	err := c.do(ctx, command, args, nil, nil)
	if err == nil {
		err = c.waitJob(ctx, command, id, sub, progress)
	} else if refused := (*Error)(nil); errors.As(err, &refused) {
		return err
	}
	if ctx.Err() != nil {
		c.cancelJob(ctx, id)
	}
	return err
}

// waitJob looks at a job whenever QEMU tells of one, and every so often.
func (c *Client) waitJob(ctx context.Context, command, id string, sub *Subscription, progress func(Job)) error {
	tick := time.NewTicker(pollJobs)
	defer tick.Stop()
	for {
		job, err := c.job(ctx, id)
		if err != nil {
			return err
		}
		if job == nil {
			return fmt.Errorf("QEMU: %s: somebody else dismissed job %s", command, id)
		}
		if progress != nil {
			progress(*job)
		}
		if job.Status == "concluded" {
			err := c.do(ctx, "job-dismiss", map[string]string{"id": id}, nil, nil)
			if job.Error != "" {
				return &JobError{Command: command, ID: id, Desc: job.Error}
			}
			return err
		}
		select {
		case <-sub.Events():
		case <-tick.C:
		case <-ctx.Done():
			return late(ctx.Err(), command)
		}
	}
}

func (c *Client) job(ctx context.Context, id string) (*Job, error) {
	var list []Job
	if err := c.do(ctx, "query-jobs", nil, &list, nil); err != nil {
		return nil, err
	}
	for i := range list {
		if list[i].ID == id {
			return &list[i], nil
		}
	}
	return nil, nil
}

// cancelJob tries to end a job and to take it away.
func (c *Client) cancelJob(ctx context.Context, id string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	_ = c.do(ctx, "job-cancel", map[string]string{"id": id}, nil, nil)
	for ctx.Err() == nil {
		job, err := c.job(ctx, id)
		if err != nil || job == nil {
			return
		}
		if job.Status == "concluded" {
			_ = c.do(ctx, "job-dismiss", map[string]string{"id": id}, nil, nil)
			return
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}
